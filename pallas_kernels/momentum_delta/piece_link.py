"""The states between two pieces of a row: `X_(j+1) = Phi_j X_j + U_j`, or the same back.

    inputs   which: target, source and map; phi [B, HV, maps, 2 K, 2 K]; states
             [B, HV, slots, 2 K, V], or those and maps beside each other; whether a piece keeps
             anything, or None
    outputs  states, in their memory: the target has the product with the source added
    grid     (blocks of both dims, B, HV): a tile of the target a program

Why so: the products are few and small, but wait for each other, so every launch spreads one over
the device. Which piece it is comes as an array: all launches are one kernel to compile.

Constraints: products of float32 in three passes of bfloat16, so that a link rounds as float32 does.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import dot, kernel_call
from pallas_kernels.momentum_delta.types import Options

_TILE = 64
_WARPS, _STAGES = 4, 3


def link(
    states: jax.Array,
    phi: jax.Array | None,
    which: tuple[int, int, int],
    options: Options,
    *,
    kept: jax.Array | None = None,
    back: bool = False,
) -> jax.Array:
    """States with `phi[map] states[source]` added to the target.

    Args:
      states: `[B, HV, slots, 2 K, columns]` float32, whose memory is taken.
      phi: `[B, HV, maps, 2 K, 2 K]` float32.
      which: target, source, map.
      options: of the call.
      kept: whether a piece keeps anything of its entering states, `[B, HV, maps]` int32. Nothing is
        added where it does not, whatever is in `phi` and in the source. None: all do.
      back: the way back, with `phi` transposed.
    """
    assert phi is not None
    batch, heads, pieces, rows, columns = states.shape
    count = phi.shape[2]
    row_tile, column_tile = min(_TILE, rows), math.gcd(_TILE, columns)
    across = columns // column_tile

    def row(i: jax.Array) -> jax.Array:
        return lax.div(i, across)

    def column(i: jax.Array) -> jax.Array:
        return lax.rem(i, across)

    def spec(*shape: int, index: Any = lambda i: (0, 0)) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda i, b, h: (b, h, 0, *index(i)))

    source = spec(pieces, rows, column_tile, index=lambda i: (0, column(i)))
    target = spec(pieces, row_tile, column_tile, index=lambda i: (row(i), column(i)))
    if back:
        maps = spec(count, rows, row_tile, index=lambda i: (0, row(i)))
    else:
        maps = spec(count, row_tile, rows, index=lambda i: (row(i), 0))
    result: jax.Array = kernel_call(
        partial(_link, row=row, back=back, precision=options.numerics.exact),
        jnp.array(which, jnp.int32),
        states,
        phi,
        kept,
        name="mdn_piece_link_back" if back else "mdn_piece_link",
        grid=(rows // row_tile * across, batch, heads),
        in_specs=[
            pl.BlockSpec((3,), lambda i, b, h: (0,)),
            source,
            maps,
            None if kept is None else spec(count, index=lambda i: ()),
        ],
        out_specs=target,
        out_shape=jax.ShapeDtypeStruct(states.shape, states.dtype),
        aliases={1: 0},
        warps=_WARPS,
        stages=_STAGES,
        interpret=options.interpret,
    )
    return result


def _link(which, states, phi, kept, out, *, row, back, precision):
    target, source, at = which[0], which[1], which[2]
    _, tile, columns = out.shape
    own = pl.ds(row(pl.program_id(0)) * tile, tile)

    def step(k: jax.Array, total: jax.Array) -> jax.Array:
        steps = pl.ds(k * tile, tile)
        factor = phi[at, steps, :].T if back else phi[at, :, steps]
        return total + dot(factor, states[source, steps, :], precision)

    zeros = jnp.zeros((tile, columns), jnp.float32)
    total = lax.fori_loop(0, states.shape[1] // tile, step, zeros)
    if kept is not None:
        total = jnp.where(kept[at] != 0, total, 0.0)
    # another program's tile is never read: the source is another piece
    out[target, :, :] = states[target, own, :] + total
