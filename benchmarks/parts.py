"""The parts of a training step, each by itself at the shapes of the step, forward and backward."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.timing import measure
from mdn_jax import MDNConfig
from mdn_jax.layers.momentum_deltanet import MomentumDeltaNet
from mdn_jax.layers.sharding import sharded_momentum_delta_rule
from mdn_jax.models.causal_lm import Block
from mdn_jax.models.loss import summed_loss
from mdn_jax.ops.api import Implementation
from mdn_jax.ops.state import MDNState


@dataclass(frozen=True)
class Shapes:
    """What the parts of a step are timed at.

    Attributes:
      model: the model.
      rows: of a micro-batch.
      length: tokens in a row.
      dtype: of the computation.
      implementation: of the momentum delta rule.
    """

    model: MDNConfig
    rows: int
    length: int
    dtype: jnp.dtype
    implementation: Implementation | None = None

    def normal(self, *width: int, seed: int = 0) -> jax.Array:
        """Activations `[rows, length, *width]`."""
        shape = (self.rows, self.length, *width)
        return jax.random.normal(jax.random.key(seed), shape, self.dtype)


def time_parts(shapes: Shapes, segment_ids: jax.Array, *, runs: int) -> dict[str, float]:
    """Seconds of each part in one micro-batch, over all layers.

    Args:
      shapes: of the step.
      segment_ids: documents of its tokens, `[rows, length]`.
      runs: groups of calls that each is timed in.
    """
    model = shapes.model
    attention = sum(model.is_attention(i) for i in range(model.num_hidden_layers))
    seconds: dict[str, float] = {}
    for is_attention, count in ((False, model.num_hidden_layers - attention), (True, attention)):
        if not count:
            continue
        layer = [model.is_attention(i) for i in range(model.num_hidden_layers)].index(is_attention)
        for name, function, *arguments in _of_block(shapes, layer, segment_ids):
            time = measure(_both(function), *arguments, runs=runs).median
            seconds[name] = seconds.get(name, 0.0) + count * time
            print(f"{name}: {count} x {time * 1e3:.3f} ms", flush=True)
    for name, function, *arguments in _of_model(shapes):
        seconds[name] = measure(_both(function), *arguments, runs=runs).median
        print(f"{name}: {seconds[name] * 1e3:.3f} ms", flush=True)
    return seconds


def _both(function: Callable[..., Any]) -> Callable[..., Any]:
    """Outputs and gradients by every argument, with the outputs as cotangents."""

    def run(*arguments: Any) -> Any:
        outputs, pull = jax.vjp(function, *arguments)
        return outputs, pull(outputs)

    return run


Part = tuple[Any, ...]
"""Name, function and its arguments."""


def _of_block(shapes: Shapes, layer: int, segment_ids: jax.Array) -> Iterator[Part]:
    model = shapes.model
    block = Block(
        model,
        layer,
        implementation=shapes.implementation,
        dtype=shapes.dtype,
        param_dtype=shapes.dtype,  # as the step rounds them
        rngs=nnx.Rngs(0),
    )
    h = shapes.normal(model.hidden_size)
    yield "MLP", *_part(block, ("mlp",), lambda block, h: block.mlp(h)), h
    norms = ("mixer_norm", "mlp_norm")
    both = _part(
        block,
        norms,
        lambda block, h, g: (block.mixer_norm.with_input(h), block.mlp_norm.with_input(g)),
    )
    yield "norms", *both, h, h
    if isinstance(block.mixer, MomentumDeltaNet):
        yield from _of_mixer(shapes, block, segment_ids)
    else:
        attend = _part(block, ("mixer.",), lambda block, h: block.mixer(h, segment_ids)[0])
        yield "attention", *attend, h


def _part(
    block: Block, names: tuple[str, ...], function: Callable[..., Any]
) -> tuple[Callable[..., Any], Any]:
    """A function of a block's parameters under some names, and those parameters."""

    def own(path: tuple[Any, ...], _: Any) -> bool:
        return ".".join(map(str, path)).startswith(names)

    graph, state, *others = nnx.split(block, own, ...)
    others = jax.tree.map(jnp.shape, others)  # must not be used
    return lambda state, *inputs: function(nnx.merge(graph, state, *others), *inputs), state


def _of_mixer(shapes: Shapes, block: Block, segment_ids: jax.Array) -> Iterator[Part]:
    model = shapes.model
    h, values = shapes.normal(model.hidden_size), shapes.normal(model.value_dim)

    def project(block: Any, x: jax.Array, o: jax.Array) -> Any:
        mixer = block.mixer
        gate = None if mixer.g_proj is None else mixer.g_proj(x)
        return mixer.projected(x), gate, mixer.o_proj(o)

    # which also names the convolutions, that say whether their inputs are of one product
    names = (*(f"mixer.{x}_proj" for x in "qkvgo"), *(f"mixer.{x}_conv1d" for x in "qkv"))
    projections = _part(block, names, project)
    yield "projections", *projections, h, values

    gate = _part(block, ("mixer.gates",), lambda block, x: tuple(block.mixer.gates(x)))
    yield "gates", *gate, h

    def convolve(block: Any, projected: Any) -> Any:
        cache = block.mixer.init_cache(shapes.rows)
        return block.mixer.convolved(projected, segment_ids, cache)[:3]

    names = (*(f"mixer.{x}_conv1d" for x in "qkv"), "mixer.d_log")
    convolution = _part(block, names, convolve)
    inner, *_ = jax.eval_shape(projections[0], projections[1], h, values)
    leaves, tree = jax.tree.flatten(inner)
    normal = [shapes.normal(x.shape[-1], seed=seed) for seed, x in enumerate(leaves)]
    projected = jax.tree.unflatten(tree, normal)
    yield "convolutions", *convolution, projected

    heads = shapes.normal(model.value_heads, model.head_v_dim)
    norm = _part(block, ("mixer.o_norm",), lambda block, *inputs: block.mixer.o_norm(*inputs))
    yield "norms", *norm, heads, heads

    sizes = (shapes.rows, model.value_heads, model.head_dim, model.head_v_dim)
    state = MDNState.zeros(*sizes, jnp.promote_types(shapes.dtype, jnp.float32))

    def rule(*arrays: jax.Array) -> jax.Array:
        return sharded_momentum_delta_rule(
            *arrays,
            initial_state=state,
            segment_ids=segment_ids,
            implementation=shapes.implementation,
        )[0]

    convolved = jax.jit(convolution[0])(convolution[1], projected)
    arrays = (*convolved, *jax.jit(gate[0])(gate[1], h))
    yield "kernel", rule, *arrays


def _of_model(shapes: Shapes) -> Iterator[Part]:
    model = shapes.model
    tokens = jax.random.randint(
        jax.random.key(0), (shapes.rows, shapes.length), 0, model.vocab_size
    )
    table = jax.random.normal(jax.random.key(1), (model.vocab_size, model.hidden_size))
    yield "embeddings", lambda table: jnp.take(table, tokens, axis=0).astype(shapes.dtype), table
    h = shapes.normal(model.hidden_size)
    yield "loss", lambda h, kernel: summed_loss(h, kernel, tokens), h, table.T * 0.02
