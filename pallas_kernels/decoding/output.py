"""The gated norm of the rule's output, its projection and the residual (`mdn_decode_output`).

Computes, with the norm of every head's V columns:

    h + (rms_norm(o) * sigmoid(gate)) output

    inputs   o [B, HV V] with sums of its squares [B, HV, blocks]; the gate's argument, columns of
             what the projections gave; the norm's scale [V]; the matrix [hidden, HV V]; h
    outputs  the residual stream: the new h [B, hidden] and sums of its squares
    grid     flat, blocks of rows x blocks of outputs

Why so: each program makes the norm again from o and its sums of squares, which are in the cache
while its weights come from memory.

Constraints: a step of the width lies within a head.

Run it alone: `python -m benchmarks decoding`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.decoding.mixer import Mixed
from pallas_kernels.decoding.products import (
    Inputs,
    Matrix,
    Product,
    add_to_stream,
    multiply,
)
from pallas_kernels.decoding.tiles import product_tiles
from pallas_kernels.decoding.types import Leaf, Plan, Stream, like
from pallas_kernels.lowering import masked_load

NAME = "mdn_decode_output"


class _Inputs(NamedTuple):
    h: Leaf
    o: Leaf
    squares: Leaf
    y: Leaf | None
    scale: Leaf
    weights: Leaf


def output(h: Leaf, mixed: Mixed, y: Leaf, scale: Leaf, weights: Leaf, plan: Plan) -> Stream:
    """The residual stream after the mixer."""
    (batch, width), (hidden, _) = mixed.o.shape, weights.shape
    shipped = product_tiles(batch, hidden, width, weights.dtype.itemsize)
    tiles = plan.tiles_of(NAME, shipped)
    step = min(tiles.width, plan.value_dim & -plan.value_dim)
    if step < tiles.width:  # as many weights at once in smaller steps
        steps = width // step
        most = min(tiles.at_once * tiles.width // step, steps)
        at_once = next(n for n in range(most, 0, -1) if steps % n == 0)
        tiles = tiles._replace(width=step, at_once=at_once)
    product = Product(batch, hidden, width, tiles)

    def body(x: Any, out: Any) -> None:
        def prepare(rows: jax.Array) -> Inputs:
            return _gated_norm(x, rows, rows < batch, plan, step)

        multiply(
            product, [Matrix(x.weights, 0)], prepare, lambda block: add_to_stream(out, x.h, block)
        )

    stream: Stream = product.call(
        body,
        _Inputs(h, mixed.o, mixed.squares, y if plan.gated else None, scale, weights),
        name=NAME,
        out_shape=Stream(like(h.shape, h.dtype), like((batch, product.blocks))),
        interpret=plan.interpret,
    )
    return stream


def _gated_norm(x: Any, rows: jax.Array, inside: jax.Array, plan: Plan, width: int) -> Inputs:
    value_dim, blocks = plan.value_dim, x.squares.shape[2]
    lane = lax.broadcasted_iota(jnp.int32, (1, pl.next_power_of_2(blocks)), 1)

    def inputs(step: Any, columns: jax.Array) -> jax.Array:
        head = step * width // value_dim
        parts = masked_load(x.squares.at[rows, head, lane], inside & (lane < blocks))
        square = jnp.sum(parts, axis=1, keepdims=True)
        own = inside & (columns >= 0)
        o = masked_load(x.o.at[rows, columns], own)
        value = o.astype(jnp.float32) * lax.rsqrt(square * (1.0 / value_dim) + plan.eps)
        place = x.scale.at[columns - head * value_dim]
        value *= masked_load(place, columns >= 0).astype(jnp.float32)
        if x.y is not None:
            gate = masked_load(x.y.at[rows, columns + plan.channels], own).astype(jnp.float32)
            value *= 1.0 / (1.0 + jnp.exp(-gate))
        return value.astype(o.dtype)

    return inputs
