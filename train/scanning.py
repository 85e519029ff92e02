"""The blocks of a model as a scan over stacked layers: one program for all that are alike.

The compiler sees as many blocks as the layers have before they repeat, one of a model of one mixer.
What a block keeps for its derivative is copied into arrays of all layers, and out of them again.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from mdn_jax import MDNForCausalLM
from mdn_jax.errors import RunError
from mdn_jax.models.causal_lm import Block, apply_block
from mdn_jax.models.loss import summed_loss
from mdn_jax.saved.model import Params
from train.data.packing import Batch
from train.stacking import LAYERS, STACKS, Groups, unstacked


def scanned_loss(
    model: MDNForCausalLM, groups: Groups
) -> Callable[[Params, Batch], Float[Array, ""]]:
    """The summed loss of a model as a function of its stacked parameters.

    Args:
      model: arrays or shapes.
      groups: layers of each stack.

    Raises:
      RunError: layers that do not repeat.
    """
    first = _before_they_repeat(model, groups)
    graph, params, *rest = nnx.split(model, nnx.Param, ...)
    outer = nnx.merge(graph, params, *rest)
    outer.layers = nnx.List([])
    outer_graph, _, *outer_rest = nnx.split(outer, nnx.Param, ...)

    def loss(params: Params, batch: Batch) -> Float[Array, ""]:
        others = {name: x for name, x in params.items() if name != STACKS}
        run = nnx.merge(outer_graph, others, *outer_rest)
        documents = batch.get("segment_ids")  # none: a row is one document
        h, _ = run.hidden(
            jnp.asarray(batch["tokens"]),
            segment_ids=None if documents is None else jnp.asarray(documents),
            blocks=lambda h, documents: _scan(first, params[STACKS], h, documents),
        )
        return summed_loss(h, run.output_kernel(), batch["targets"])

    return loss


def _before_they_repeat(model: MDNForCausalLM, groups: Groups) -> list[Block]:
    """The first blocks, after which the others follow in the same order again and again."""
    stack = {layer: group for group in groups for layer in group}
    blocks = list(model.layers)
    kinds = [(stack[i], nnx.split(block)[0]) for i, block in enumerate(blocks)]
    for period in range(1, len(blocks) // 2 + 1):
        if len(blocks) % period == 0 and kinds == kinds[:period] * (len(blocks) // period):
            return blocks[:period]
    raise RunError(
        f"scan_layers: expected layers that repeat after a divisor of their number, got "
        f"{len(blocks)} layers, {', '.join(model.config.mixers)}, which do not (frozen ones count "
        "as different)"
    )


def _scan(
    first: list[Block],
    stacks: Params,
    h: Float[Array, "B T hidden"],
    documents: Int[Array, "B T"] | None,
) -> Float[Array, "B T hidden"]:
    repeats = sum(len(group) for group in stacks) // len(first)

    def repeated(x: Array) -> Array:
        return x.reshape(repeats, x.shape[0] // repeats, *x.shape[1:])

    def body(h: Any, stacks: Params) -> tuple[Any, None]:
        layers = unstacked({STACKS: stacks})[LAYERS]
        for layer, block in enumerate(first):
            graph, _, *rest = nnx.split(block, nnx.Param, ...)
            h, _ = apply_block(nnx.merge(graph, layers[layer], *rest), h, documents)
        return h, None

    once = {group[: len(group) // repeats]: arrays for group, arrays in stacks.items()}
    return lax.scan(body, h, jax.tree.map(repeated, once))[0]
