"""The norm of the rule's output, its projection and the residual (`mdn_decode_output`).

Computes, with the norm of every head's V columns:

    h + (gated * rsqrt(mean o^2 + eps)) output

    inputs   gated [B, HV V] float32 and the sums of squares of o [B, HV, blocks], of the mixer; the
             matrix [hidden, HV V]; h [B, hidden]
    outputs  the residual stream: the new h and sums of its squares
    grid     flat, blocks of rows x blocks of outputs

Why so: each program makes the norm again while its weights come from memory, so it has little left
to do: scale and gate are in what the mixer gives.

Constraints: a step of the width lies within a head.

Run it alone: `python -m benchmarks decoding`.
"""

from typing import Any

import jax

from pallas_kernels.decoding.mixer import Mixed
from pallas_kernels.decoding.products import (
    Inputs,
    Matrix,
    Product,
    add_to_stream,
    inverse_root,
    multiply,
)
from pallas_kernels.decoding.tiles import product_tiles
from pallas_kernels.decoding.types import Leaf, Plan, Stream, like
from pallas_kernels.lowering import masked_load

NAME = "mdn_decode_output"


def output(h: Leaf, mixed: Mixed, weights: Leaf, plan: Plan) -> Stream:
    """The residual stream after the mixer."""
    (batch, width), (hidden, _) = mixed.gated.shape, weights.shape
    shipped = product_tiles(batch, hidden, width, weights.dtype.itemsize)
    tiles = plan.tiles_of(NAME, shipped).within(plan.value_dim, width)
    product = Product(batch, hidden, width, tiles, plan.interpret)

    def body(h: Any, mixed: Any, weights: Any, out: Any) -> None:
        def prepare(rows: jax.Array) -> Inputs:
            inside = rows < batch

            def inputs(step: Any, columns: jax.Array) -> jax.Array:
                head = step * tiles.width // plan.value_dim
                place = (rows, head)
                inverse = inverse_root(mixed.squares, place, inside, plan.value_dim, plan.eps)
                gated = masked_load(mixed.gated.at[rows, columns], inside & (columns >= 0))
                return (gated * inverse).astype(h.dtype)

            return inputs

        multiply(product, [Matrix(weights, 0)], prepare, lambda block: add_to_stream(out, h, block))

    stream: Stream = product.call(
        body,
        h,
        mixed,
        weights,
        name=NAME,
        out_shape=Stream(like(h.shape, h.dtype), like((batch, product.blocks))),
    )
    return stream
