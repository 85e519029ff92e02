"""A long prompt read by several devices, each a stretch of it; one device goes on from there."""

from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from mdn_jax.layers.state_mixer import StateMixer
from mdn_jax.models.arguments import check_prompts
from mdn_jax.models.causal_lm import MDNForCausalLM, ModelCache
from mdn_jax.models.generation_state import GenerationState, initial_state
from mdn_jax.models.prefill import Prompts, prefill
from mdn_jax.ops.context import of_last_device


def prefill_over(
    mesh: Mesh, model: MDNForCausalLM, prompts: Prompts, *, axis: str = "context"
) -> GenerationState:
    """`prefill`, with the tokens of each prompt cut over the devices of a mesh axis.

    Each device has its stretch of the prompts in one call of the model, and a state of fixed size
    is all that it gets of the others (docs/long_context.md); keys and values of layers of softmax
    attention are gathered. What is left over, where prompts are of several lengths or do not divide
    into stretches, `prefill` reads after that.

    Args:
      mesh: of the devices; those of other axes do the same.
      model: whose parameters are copied to all devices; a prompt's state goes to where they are.
      prompts: token ids of each row, not empty.
      axis: of the mesh.

    Returns:
      The state after the prompts, as `prefill` gives it, for `stream` and `prefill`.

    Raises:
      ValueError: an argument that does not fit, by name.
    """
    mesh = Mesh(mesh.devices, mesh.axis_names)  # of Auto axes
    if axis not in mesh.shape:
        raise ValueError(f"axis: expected one of {', '.join(mesh.axis_names)}, got {axis!r}")
    for mixer in (layer.mixer for layer in model.layers):
        if isinstance(mixer, StateMixer) and not mixer.in_context:
            raise ValueError(
                f"model: expected mixers that have stretches, got {type(mixer).__name__}"
            )
    tokens = check_prompts(prompts, model.config.vocab_size, None)
    count = mesh.shape[axis]
    stretch = min(map(len, tokens)) // count
    config = model.config
    if stretch < (config.conv_size if config.use_short_conv else 1):
        return prefill(model, prompts)
    read = np.asarray([row[: stretch * count] for row in tokens], np.int32)
    graph, weights = nnx.split(_in_stretches(model, axis))
    everywhere = NamedSharding(mesh, PartitionSpec())
    home = jax.tree.leaves(weights)[0].sharding
    cache, logits = _read(graph, mesh, axis, jax.device_put(weights, everywhere), read)
    cache, logits = jax.device_put((cache, logits), home)
    before = initial_state(model, len(tokens))
    rows = np.arange(len(tokens))[:, None]
    state = before._replace(
        cache=cache,
        logits=logits,
        seen=before.seen.at[rows, read].set(True),
        position=before.position + read.shape[1],
    )
    return prefill(model, [row[read.shape[1] :].tolist() for row in tokens], state=state)


def _in_stretches(model: MDNForCausalLM, axis: str) -> MDNForCausalLM:
    """The model with this `context_axis`; its parameters are the same arrays."""
    copy = nnx.merge(*nnx.split(model))
    for _, module in nnx.iter_modules(copy):
        if hasattr(module, "context_axis"):
            module.context_axis = axis
    return copy


@partial(jax.jit, static_argnums=(0, 1, 2))
def _read(
    graph: Any, mesh: Mesh, axis: str, weights: Any, tokens: Int[Array, "B T"]
) -> tuple[ModelCache, Array]:
    """The cache and the logits after the last token, on every device."""

    def stretch(weights: Any, tokens: Array) -> tuple[ModelCache, Array]:
        model = nnx.merge(graph, weights)
        h, cache = model.hidden(tokens)
        last: Array = of_last_device(h[:, -1], axis)
        return cache, model.logits(last)

    whole = PartitionSpec()
    result: tuple[ModelCache, Array] = jax.shard_map(
        stretch, mesh=mesh, in_specs=(whole, PartitionSpec(None, axis)), out_specs=whole
    )(weights, tokens)
    return result
