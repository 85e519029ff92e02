"""Tiles between memory and the registers in which a product leaves them, with nothing exchanged.

A warp holds 16 rows of a product's result. Each group of four lanes has a row of its upper eight
and one of its lower eight, and the lane `q` of a group columns `8 j + 2 q` and `8 j + 2 q + 1`.
Two columns are 4 bytes; a load or store of 16 takes eight neighbours, so that a compiler moves
every tile from lane to lane by way of shared memory. Here a tile's columns go to memory in another
order instead: of each 32, lane `q` takes the eight from `8 q`. In the state passes whatever is of
values (v, v_new, the columns of states) has its columns in that order, so that products agree; in
`inter_chunk_bwd` the keys have, and the rows of states are loaded in it.

The order of the dimensions in `_places` is the one for which the compiler gives the last to lanes
and vectors, the one before to lanes, the one before that to warps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lowering import masked_load, masked_store
from pallas_kernels.momentum_delta.types import Leaf

_WARP_ROWS = 16


class RegisterLayout(NamedTuple):
    """Loads and stores tiles `[rows, columns]`.

    Attributes:
      warps: of a program.
      columns: of a tile, 16 or a multiple of 32.
    """

    warps: int
    columns: int

    def load(
        self, ref: Leaf, rows: int, *at: Any, first: Any = 0, where: jax.Array | None = None
    ) -> jax.Array:
        """`ref[*at, first : first + rows, :]`, its columns in the order of registers.

        Zeros, and nothing is read, if the scalar `where` is False.
        """
        place = (*at, *self._places(rows, first))
        tile = ref[place] if where is None else masked_load(ref.at[place], where)
        blocks, group, high, warps = self._cut(rows)
        tile = tile.reshape(blocks, high, 2, warps, 8, 4, group // 8, 2)
        return tile.transpose(1, 3, 2, 4, 0, 6, 5, 7).reshape(rows, self.columns)

    def store(
        self,
        tile: jax.Array,
        ref: Leaf,
        *at: Any,
        first: Any = 0,
        where: jax.Array | None = None,
    ) -> None:
        """Sets what `load` reads; nothing if the scalar `where` is False."""
        rows = len(tile)
        blocks, group, high, warps = self._cut(rows)
        tile = tile.reshape(high, warps, 2, 8, blocks, group // 8, 4, 2)
        tile = tile.transpose(4, 0, 2, 1, 3, 6, 5, 7)
        tile = tile.reshape(blocks, 2 * high, warps, 8, group)
        store_where(ref, (*at, *self._places(rows, first)), tile, where)

    def order(self) -> jax.Array:
        """Where in memory each column of a loaded tile is, `[columns]`."""
        column = lax.broadcasted_iota("int32", (self.columns,), 0)
        group = min(self.columns, 32)
        lane, eight = lax.rem(column, 8) // 2, lax.rem(column, group) // 8
        return group * (column // group) + group // 4 * lane + 2 * eight + lax.rem(column, 2)

    def _cut(self, rows: int) -> tuple[int, int, int, int]:
        """Groups of columns, columns of a group, tiles of all warps on each other, warps."""
        group, warps = min(self.columns, 32), min(self.warps, rows // _WARP_ROWS)
        return self.columns // group, group, rows // (_WARP_ROWS * warps), warps

    def _places(self, rows: int, first: Any) -> tuple[jax.Array, jax.Array]:
        """Row and column of what is where, `[blocks, half warps' rows, warps, 8, group]`."""
        blocks, group, high, warps = self._cut(rows)
        shape = (blocks, 2 * high, warps, 8, group)
        block, eights, warp, row, column = (
            lax.broadcasted_iota("int32", shape, i) for i in range(len(shape))
        )
        row += first + 8 * lax.rem(eights, 2) + _WARP_ROWS * (warps * lax.div(eights, 2) + warp)
        return row, group * block + column


def store_where(ref: Leaf, place: Any, values: jax.Array, where: jax.Array | None) -> None:
    """`ref[place] = values`, if the scalar `where` is True or None."""
    if where is None:
        ref[place] = values
    else:
        masked_store(ref.at[place], values, where)


def join(a: jax.Array, b: jax.Array) -> jax.Array:
    """Two tiles as one of twice the columns, eight of either in turn.

    Where both are in registers as products leave them, so is the result.
    """
    rows, columns = a.shape
    a, b = (x.reshape(rows, columns // 8, 8, 1) for x in (a, b))
    both = jnp.concatenate([a, b], axis=3).transpose(0, 1, 3, 2)
    return both.reshape(rows, 2 * columns)


def split(both: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tiles that `join` made one."""
    rows, columns = both.shape
    both = both.reshape(rows, columns // 16, 2, 8).transpose(0, 1, 3, 2)
    a, b = (x.reshape(rows, columns // 2) for x in jnp.split(both, 2, axis=3))
    return a, b
