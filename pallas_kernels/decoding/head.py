"""The last norm and the output projection (`mdn_decode_head`).

Computes rms_norm(h) head as float32 logits; the scale of the norm is in the weights.

    inputs   the residual stream h [B, hidden] with its sums of squares; the matrix
             [vocab, hidden]
    outputs  logits [B, vocab] float32
    grid     flat, blocks of rows x blocks of outputs

Run it alone: `python -m benchmarks decoding`.
"""

from typing import Any

from pallas_kernels.decoding.products import Matrix, Product, multiply, normalized
from pallas_kernels.decoding.tiles import product_tiles
from pallas_kernels.decoding.types import Leaf, Plan, Stream, like

NAME = "mdn_decode_head"


def logits(stream: Stream, weights: Leaf, plan: Plan) -> Leaf:
    """The logits `[B, vocab]` float32 of the next token."""
    (batch, hidden), (vocab, _) = stream.h.shape, weights.shape
    shipped = product_tiles(batch, vocab, hidden, weights.dtype.itemsize)
    product = Product(batch, vocab, hidden, plan.tiles_of(NAME, shipped), plan.interpret)

    def body(stream: Any, weights: Any, out: Any) -> None:
        inputs_of = normalized(stream, product, plan.eps)
        multiply(
            product,
            [Matrix(weights, 0)],
            inputs_of,
            lambda block: block.store(out, block.values[0]),
        )

    return product.call(
        body,
        stream,
        weights,
        name=NAME,
        out_shape=like((batch, vocab)),
    )
