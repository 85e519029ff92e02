"""The kernels of a token's step by themselves, each on the weights of all layers."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from mdn_jax import MDNForCausalLM
from pallas_kernels.decoding import LayerMemory, Plan, Stream, Tiles, kernels, product_tiles


class Case(NamedTuple):
    """A kernel with what it runs on.

    Attributes:
      name: of the kernel.
      weights: of every layer.
      run: of a plan, a layer's weights, a carry and the layer, to the next carry.
      carry: makes the first carry.
      moved: bytes, over all layers.
      product: outputs, width, bytes of a weight, matrices; None: no product.
    """

    name: str
    weights: list[Any]
    run: Callable[[Plan, Any, Any, int], Any]
    carry: Callable[[], tuple[Any, ...]]
    moved: int
    product: tuple[int, int, int, int] | None

    def loop(self, plan: Plan, count: int) -> Callable[..., Any]:
        """`count` turns, each over all layers."""

        def turns(weights: Any, *carry: Any) -> Any:
            run = jax.jit(partial(self.run, plan), static_argnums=2)  # traced once for all layers

            def body(_: Any, carry: Any) -> Any:
                for i, own in enumerate(weights):
                    carry = run(own, carry, i if self.product is None else 0)
                return carry

            return lax.fori_loop(0, count, body, carry)

        return jax.jit(turns, donate_argnums=tuple(range(1, 1 + len(self.carry()))))


def cases(weights: Any, model: MDNForCausalLM, batch: int, plan: Plan) -> Iterator[Case]:
    hidden, dtype = model.config.hidden_size, model.dtype
    layers, first = list(weights.layers), weights.layers[0]
    itemsize = jnp.dtype(dtype).itemsize
    key = jax.random.key(0)

    def stream() -> Stream:
        h = jax.random.normal(key, (batch, hidden)).astype(dtype)
        return Stream(h, jnp.sum(jnp.square(h.astype(jnp.float32)), axis=1, keepdims=True))

    def sizes(matrix: Array, matrices: int = 1) -> tuple[int, int, int, int]:
        return matrix.shape[0] // matrices, matrix.shape[1], itemsize, matrices

    def nudged(stream: Stream, by: Array) -> Stream:
        """A stream that depends on a result, so that nothing is left out."""
        return Stream(stream.h, stream.squares + 1e-30 * by.astype(jnp.float32))

    def bytes_of(*names: str) -> int:
        return sum(getattr(x, name).nbytes for x in layers for name in names)

    def projections(plan: Plan, own: Any, carry: Any, _: int) -> Any:
        (x,) = carry
        out = kernels.projections(x, own.projections, plan)
        return (nudged(x, out.gates[:, :1]),)

    yield Case(
        "mdn_decode_projections",
        layers,
        projections,
        lambda: (stream(),),
        bytes_of("projections"),
        sizes(first.projections),
    )

    projected = kernels.projections(stream(), first.projections, plan)
    states = [jnp.zeros((batch, plan.value_heads, plan.key_dim, plan.value_dim)) for _ in range(2)]

    def mixer(plan: Plan, own: Any, carry: Any, i: int) -> Any:
        memories, projected, slot, active = carry
        mixed, memory = kernels.mixer(projected, own, memories[i], slot, active, plan)
        memories = (*memories[:i], memory, *memories[i + 1 :])
        gates = projected.gates + 1e-30 * mixed.gated[:, :1]
        return memories, projected._replace(gates=gates), slot, active

    def memories() -> tuple[Any, ...]:
        tail = (batch, plan.conv_size, plan.channels)
        each = tuple(
            LayerMemory(jnp.copy(states[0]), jnp.copy(states[1]), jnp.zeros(tail, dtype))
            for _ in layers
        )
        copies = jax.tree.map(jnp.copy, projected)
        return each, copies, jnp.zeros((batch,), jnp.int32), jnp.ones((batch,), jnp.int32)

    moved = 2 * sum(x.nbytes for x in states) * len(layers)
    yield Case("mdn_decode_mixer", layers, mixer, memories, moved, None)

    memory = memories()[0][0]
    ones = jnp.ones((batch,), jnp.int32)
    mixed, _ = kernels.mixer(projected, first, memory, 0 * ones, ones, plan)

    def output(plan: Plan, own: Any, carry: Any, _: int) -> Any:
        h, mixed = carry
        return kernels.output(h, mixed, own.output, plan).h, mixed

    yield Case(
        "mdn_decode_output",
        layers,
        output,
        lambda: (stream().h, jax.tree.map(jnp.copy, mixed)),
        bytes_of("output"),
        sizes(first.output),
    )

    def up(plan: Plan, own: Any, carry: Any, _: int) -> Any:
        (x,) = carry
        return (nudged(x, kernels.up(x, own.up, plan)[:, :1]),)

    yield Case("mdn_decode_up", layers, up, lambda: (stream(),), bytes_of("up"), sizes(first.up, 2))

    activations = kernels.up(stream(), first.up, plan)

    def down(plan: Plan, own: Any, carry: Any, _: int) -> Any:
        h, activations = carry
        return kernels.down(h, activations, own.down, plan).h, activations

    yield Case(
        "mdn_decode_down",
        layers,
        down,
        lambda: (stream().h, jnp.copy(activations)),
        bytes_of("down"),
        sizes(first.down),
    )

    def head(plan: Plan, own: Any, carry: Any, _: int) -> Any:
        (x,) = carry
        return (nudged(x, kernels.logits(x, own, plan)[:, :1]),)

    yield Case(
        "mdn_decode_head",
        [weights.head],
        head,
        lambda: (stream(),),
        weights.head.nbytes,
        sizes(weights.head),
    )


def others(batch: int, outputs: int, width: int, itemsize: int, matrices: int) -> Iterator[Tiles]:
    """Tiles near those that ship."""
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
