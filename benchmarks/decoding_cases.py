"""The kernels of a token's step by themselves, each on the weights of all layers.

Each is followed by a kernel of a few microseconds, on which the next one depends: a time here is of
both, and a step takes less than the sum of its kernels.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from mdn_jax.models.fused import FusedWeights
from pallas_kernels.decoding import LayerMemory, Plan, Stream, Tiles, kernels, product_tiles
from pallas_kernels.decoding.tiles import mixer_tiles
from pallas_kernels.tiling import DecodeTiles


class Case(NamedTuple):
    """A kernel with what it runs on.

    Attributes:
      name: of the kernel.
      weights: of every layer.
      run: of a plan, a layer's weights, a carry and the layer, to the next carry.
      carry: makes the first carry.
      moved: bytes, over all layers.
      others: tiles near those that ship.
      indexed: whether the carry has something of every layer.
    """

    name: str
    weights: list[Any]
    run: Callable[[Plan, Any, Any, int], Any]
    carry: Callable[[], tuple[Any, ...]]
    moved: int
    others: list[Tiles] | list[DecodeTiles]
    indexed: bool = False

    def loop(self, plan: Plan, count: int) -> Callable[..., Any]:
        """`count` turns, each over all layers, so that no cache has a layer's weights."""

        def turns(weights: Any, *carry: Any) -> Any:
            run = jax.jit(partial(self.run, plan), static_argnums=2)  # traced once for all layers

            def body(_: Any, carry: Any) -> Any:
                for i, own in enumerate(weights):
                    carry = run(own, carry, i if self.indexed else 0)
                return carry

            return lax.fori_loop(0, count, body, carry)

        return jax.jit(turns, donate_argnums=tuple(range(1, 1 + len(self.carry()))))


def cases(weights: FusedWeights, batch: int, plan: Plan) -> Iterator[Case]:
    """Every kernel of a step.

    Args:
      weights: of a model.
      batch: rows.
      plan: of the step.
    """
    layers = list(weights.layers)

    def stream() -> Stream:
        shape = (batch, weights.head.shape[1])
        h = jax.random.normal(jax.random.key(0), shape).astype(weights.head.dtype)
        return Stream(h, jnp.sum(jnp.square(h.astype(jnp.float32)), axis=1, keepdims=True))

    def product(
        name: str,
        matrices: list[Array],
        kernel: Callable[[Plan, Array, Any], tuple[Any, ...]],
        carry: Callable[[], tuple[Any, ...]],
        joined: int = 1,
    ) -> Case:
        (outputs, width), itemsize = matrices[0].shape, matrices[0].dtype.itemsize
        moved = sum(matrix.nbytes for matrix in matrices)
        others = list(near(batch, outputs // joined, width, itemsize, joined))

        def run(plan: Plan, matrix: Array, carry: Any, _: int) -> Any:
            return kernel(plan, matrix, carry)

        return Case(name, matrices, run, carry, moved, others)

    def projections(plan: Plan, matrix: Array, carry: Any) -> tuple[Any, ...]:
        return (_after(carry[0], kernels.projections(carry[0], matrix, plan).gates),)

    def up(plan: Plan, matrix: Array, carry: Any) -> tuple[Any, ...]:
        return (_after(carry[0], kernels.up(carry[0], matrix, plan)),)

    def head(plan: Plan, matrix: Array, carry: Any) -> tuple[Any, ...]:
        return (_after(carry[0], kernels.logits(carry[0], matrix, plan)),)

    def output(plan: Plan, matrix: Array, carry: Any) -> tuple[Any, ...]:
        h, mixed = carry
        return kernels.output(h, mixed, matrix, plan).h, mixed

    def down(plan: Plan, matrix: Array, carry: Any) -> tuple[Any, ...]:
        h, activations = carry
        return kernels.down(h, activations, matrix, plan).h, activations

    def one() -> tuple[Stream]:
        return (stream(),)

    def mixed() -> tuple[Array, kernels.Mixed]:
        # as many sums of squares as the kernel writes
        tiles = mixer_tiles(plan.key_dim, plan.value_dim, batch * plan.value_heads)
        blocks = plan.value_dim // tiles.block_v
        gated = jnp.ones((batch, plan.values), weights.head.dtype)
        return stream().h, kernels.Mixed(gated, jnp.ones((batch, plan.value_heads, blocks)))

    def between() -> tuple[Array, Array]:
        return stream().h, jnp.ones((batch, layers[0].down.shape[1]), weights.head.dtype)

    matrices = [layer.projections for layer in layers]
    yield product("mdn_decode_projections", matrices, projections, one)
    yield _mixer(weights, batch, plan)
    yield product("mdn_decode_output", [layer.output for layer in layers], output, mixed)
    if layers[0].up is not None:
        yield product("mdn_decode_up", [layer.up for layer in layers], up, one, joined=2)
        yield product("mdn_decode_down", [layer.down for layer in layers], down, between)
    yield product("mdn_decode_head", [weights.head], head, one)


def _after(stream: Stream, result: Array) -> Stream:
    """A stream that depends on a result, so that nothing is left out."""
    return Stream(stream.h, stream.squares + 1e-30 * result[:, :1].astype(jnp.float32))


def _mixer(weights: FusedWeights, batch: int, plan: Plan) -> Case:
    layers, dtype = list(weights.layers), weights.head.dtype
    shape = (batch, plan.value_heads, plan.key_dim, plan.value_dim)

    def run(plan: Plan, own: Any, carry: Any, i: int) -> Any:
        memories, projected, slot, active = carry
        mixed, memory = kernels.mixer(projected, own, memories[i], slot, active, plan)
        memories = (*memories[:i], memory, *memories[i + 1 :])
        gates = projected.gates + 1e-30 * mixed.gated[:, :1].astype(jnp.float32)
        return memories, projected._replace(gates=gates), slot, active

    def carry() -> tuple[Any, ...]:
        tail = (batch, plan.conv_size, plan.channels)
        memories = tuple(
            LayerMemory(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(tail, dtype)) for _ in layers
        )
        gates = layers[0].projections.shape[0] - plan.rounded
        projected = kernels.Projected(
            jnp.ones((batch, plan.rounded), dtype), jnp.zeros((batch, gates))
        )
        slot, active = jnp.zeros((batch,), jnp.int32), jnp.ones((batch,), jnp.int32)
        return memories, projected, slot, active

    moved = 2 * 2 * 4 * batch * plan.value_heads * plan.key_dim * plan.value_dim * len(layers)
    others = list(near_mixer(plan.key_dim, plan.value_dim, batch * plan.value_heads))
    return Case("mdn_decode_mixer", layers, run, carry, moved, others, indexed=True)


def near_mixer(key_dim: int, value_dim: int, heads: int) -> Iterator[DecodeTiles]:
    """Tiles of the mixer near those that ship."""
    shipped = mixer_tiles(key_dim, value_dim, heads)
    for block in (8, 16, 32, 64):
        for warps in (1, 2, 4, 8):
            choice = DecodeTiles(block, warps)
            # elements of a state to a warp
            fits = 256 <= key_dim * block // warps <= 2048 and block <= value_dim
            if fits and choice != shipped:
                yield choice


def near(batch: int, outputs: int, width: int, itemsize: int, matrices: int) -> Iterator[Tiles]:
    """Tiles of a product near those that ship."""
    shipped = product_tiles(batch, outputs, width, itemsize, matrices=matrices)
    step = width & -width
    tiles = []
    if not shipped.dot:
        for block, warps in ((4, 4), (16, 16), (16, 8)):
            tiles.append(shipped._replace(outputs=block, warps=warps))
    if itemsize == 2:
        for rows in (16, 32, 64):
            for block in (16, 32, 64, 128):
                if (rows > 16 and rows >= 2 * batch) or block * matrices > 128:
                    continue
                most = 64 if rows + matrices * block > 128 else 128
                most = 256 if rows + matrices * block <= 64 else most
                warps = min(4, max(2, matrices * block // 16))
                tiles.append(Tiles(rows, block, min(step, most), 1, warps, 4, dot=True))
    yield from (choice for choice in tiles if choice != shipped)
