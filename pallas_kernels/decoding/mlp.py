"""The MLP of a layer in two kernels (`mdn_decode_up`, `mdn_decode_down`).

Computes, with x = rms_norm(h), whose scale is in the weights:

    up      a = silu(x gate) * (x up)              down    h + a down

    inputs   the residual stream h [B, hidden] with its sums of squares and both matrices
             [2 F, hidden]; or a [B, F] and the matrix [hidden, F]
    outputs  a [B, F]; or the new residual stream
    grid     flat, blocks of rows x blocks of outputs; up: the same block of gate and of up

Why so: the weights are the bytes. The sums of squares of the columns that a program of `down` owns
are what the next norm needs of h.

Run them alone: `python -m benchmarks decoding`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decoding.products import (
    Block,
    Inputs,
    Matrix,
    Product,
    multiply,
    normalized,
    of_rows,
    onto_stream,
)
from pallas_kernels.decoding.tiles import product_tiles
from pallas_kernels.decoding.types import Leaf, Plan, Stream, like

UP, DOWN = "mdn_decode_up", "mdn_decode_down"


def up(stream: Stream, weights: Leaf, plan: Plan) -> Leaf:
    """The activations `[B, F]` between the two products."""
    (batch, hidden), width = stream.h.shape, weights.shape[0] // 2
    shipped = product_tiles(batch, width, hidden, weights.dtype.itemsize, matrices=2)
    product = Product(batch, width, hidden, plan.tiles_of(UP, shipped), plan.interpret)

    def body(stream: Any, weights: Any, out: Any) -> None:
        def finish(block: Block) -> None:
            gate, value = (y.astype(out.dtype).astype(jnp.float32) for y in block.values)
            block.store(out, gate / (1.0 + jnp.exp(-gate)) * value)

        matrices = [Matrix(weights, 0), Matrix(weights, width)]
        multiply(product, matrices, normalized(stream, product, plan.eps), finish)

    return product.call(
        body,
        stream,
        weights,
        name=UP,
        out_shape=like((batch, width), stream.h.dtype),
    )


def down(h: Leaf, activations: Leaf, weights: Leaf, plan: Plan) -> Stream:
    """The residual stream after the MLP."""
    (batch, width), (hidden, _) = activations.shape, weights.shape
    shipped = product_tiles(batch, hidden, width, weights.dtype.itemsize)
    product = Product(batch, hidden, width, plan.tiles_of(DOWN, shipped), plan.interpret)

    def inputs_of(activations: Any, rows: jax.Array) -> Inputs:
        return Inputs(of_rows(activations, rows, batch))

    return onto_stream(product, DOWN, h, activations, weights, inputs_of)
