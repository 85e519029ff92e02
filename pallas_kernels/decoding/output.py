"""The norm of the rule's output, its projection and the residual (`mdn_decode_output`).

Computes, with the norm of every head's V columns:

    h + (gated * rsqrt(mean o^2 + eps)) output

    inputs   gated [B, HV V] and the sums of squares of o [B, HV, blocks], of the mixer; the matrix
             [hidden, HV V]; h [B, hidden]
    outputs  the residual stream: the new h and sums of its squares
    grid     flat, blocks of rows x blocks of outputs

Why so: scale and gate are in what the mixer gives, and a head's root is a factor of the products
with its columns, so that gated goes into them as it is.

Constraints: a step of the width lies within a head.

Run it alone: `python -m benchmarks decoding`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.decoding.mixer import Mixed
from pallas_kernels.decoding.products import Inputs, Product, of_rows, onto_stream
from pallas_kernels.decoding.tiles import product_tiles
from pallas_kernels.decoding.types import Leaf, Plan, Stream
from pallas_kernels.lowering import masked_load

NAME = "mdn_decode_output"


def output(h: Leaf, mixed: Mixed, weights: Leaf, plan: Plan) -> Stream:
    """The residual stream after the mixer."""
    (batch, width), (hidden, _) = mixed.gated.shape, weights.shape
    shipped = product_tiles(batch, hidden, width, weights.dtype.itemsize)
    tiles = plan.tiles_of(NAME, shipped).within(plan.value_dim, width)
    product = Product(batch, hidden, width, tiles, plan.interpret)

    def inputs_of(mixed: Any, rows: jax.Array) -> Inputs:
        heads, inverse = _roots(mixed.squares, rows, batch, plan)

        def factor(step: Any) -> jax.Array:
            own = heads == step * tiles.width // plan.value_dim
            return jnp.sum(jnp.where(own, inverse, 0.0), axis=1)

        return Inputs(of_rows(mixed.gated, rows, batch), factor)

    return onto_stream(product, NAME, h, mixed, weights, inputs_of)


def _roots(squares: Any, rows: jax.Array, batch: int, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """The numbers of the heads, `[1, heads]`, and one over their norms, `[rows, heads]`."""
    _, heads, blocks = squares.shape
    head = lax.broadcasted_iota(jnp.int32, (1, pl.next_power_of_2(heads)), 1)
    total = jnp.zeros((), jnp.float32)
    for block in range(blocks):
        place = squares.at[rows, head, block]
        total += masked_load(place, (rows < batch) & (head < heads))
    return head, lax.rsqrt(total * (1.0 / plan.value_dim) + plan.eps)
