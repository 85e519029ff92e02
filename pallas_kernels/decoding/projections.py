"""The norm and the joined projections of a mixer (`mdn_decode_projections`).

Computes, with x = rms_norm(h), whose scale is in the weights:

    y = x [q | k | v | output gate]        gates = x [a | b | e | m]

    inputs   the residual stream h [B, hidden] with its sums of squares; the matrix
             [outputs, hidden]
    outputs  y [B, ...] in the compute dtype; gates [B, gates HV] float32
    grid     flat, blocks of rows x blocks of outputs

Why so: the weights are the bytes, and one wide launch keeps the memory busy where seven narrow ones
did not. What wrote h left the sums of squares of its columns, so no program reads h twice.

Run it alone: `python -m benchmarks decoding`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.decoding.products import Block, Matrix, Product, multiply, normalized
from pallas_kernels.decoding.tiles import product_tiles
from pallas_kernels.decoding.types import Leaf, Plan, Stream, like
from pallas_kernels.lowering import masked_store

NAME = "mdn_decode_projections"


class Projected(NamedTuple):
    """Results of the kernel.

    Attributes:
      y: q, k, v and the output gate's argument side by side, `[B, ...]` in the compute dtype.
      gates: projections of the gates, `[B, gates HV]` float32.
    """

    y: Leaf
    gates: Leaf


def projections(stream: Stream, weights: Leaf, plan: Plan) -> Projected:
    """The kernel on whole arrays."""
    (batch, hidden), (outputs, _) = stream.h.shape, weights.shape
    shipped = product_tiles(batch, outputs, hidden, weights.dtype.itemsize)
    product = Product(batch, outputs, hidden, plan.tiles_of(NAME, shipped), plan.interpret)
    rounded = plan.rounded

    def body(stream: Any, weights: Any, out: Any) -> None:
        def finish(block: Block) -> None:
            gates = block.outputs >= rounded
            (y,) = block.values
            place = out.y.at[block.rows, block.outputs]
            masked_store(place, y.astype(out.y.dtype), block.inside & ~gates)
            place = out.gates.at[block.rows, block.outputs - rounded]
            masked_store(place, y, block.inside & gates)

        inputs_of = normalized(stream, product, plan.eps)
        multiply(product, [Matrix(weights, 0)], inputs_of, finish)

    projected: Projected = product.call(
        body,
        stream,
        weights,
        name=NAME,
        out_shape=Projected(
            like((batch, rounded), stream.h.dtype),
            like((batch, outputs - rounded), jnp.float32),
        ),
    )
    return projected
