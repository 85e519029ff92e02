"""Grids and block specifications of the two kinds of kernels.

Those of one chunk have a flat grid (blocks of a chunk side by side, then heads, chunks, rows of the
batch). Those that walk over the chunks of a head in order have the grid (block of V, b, h).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.momentum_delta.launches import Launch
from pallas_kernels.momentum_delta.rows import GRADIENT_ROWS, FactorRow
from pallas_kernels.momentum_delta.types import CHUNK, Leaf, Memory, Sizes, States, Values


class ChunkSpecs:
    """Grid and block specifications of a kernel of one chunk.

    The blocks of a chunk run side by side, for they read the same rows; heads come next, whose
    gates share cache lines. One flat dimension, for CUDA allows 65,535 programs along the others.
    """

    def __init__(self, sizes: Sizes, blocks: int = 1) -> None:
        self._z, self._blocks = sizes, blocks

    @property
    def grid(self) -> tuple[int]:
        """Programs of the kernel."""
        z = self._z
        return (self._blocks * z.value_heads * z.chunks * z.batch,)

    def block(self, program: jax.Array) -> jax.Array:
        """Which block of its chunk a program takes."""
        return lax.rem(program, self._blocks)

    def _spec(self, shape: tuple[int | None, ...], index: Callable[..., tuple]) -> pl.BlockSpec:
        heads, chunks = self._z.value_heads, self._z.chunks

        def indices(program: jax.Array) -> tuple:
            rest = lax.div(program, self._blocks)
            h, rest = lax.rem(rest, heads), lax.div(rest, heads)
            return index(lax.rem(rest, chunks), lax.div(rest, chunks), h, self.block(program))

        return pl.BlockSpec(shape, indices)

    def tokens(self, width: int, heads: int, *, blocked: bool = False) -> pl.BlockSpec:
        """`[C, width]` of an array `[B, T, heads, ...]`."""
        share = self._z.value_heads // heads
        return self._spec(
            (None, CHUNK, None, width),
            lambda c, b, h, i: (b, c, lax.div(h, share), i if blocked else 0),
        )

    def gate(self) -> pl.BlockSpec:
        """`[C]` of a gate `[B, T, HV]`."""
        return self._spec((None, CHUNK, None), lambda c, b, h, i: (b, c, h))

    def array(self, *shape: int) -> pl.BlockSpec:
        """`[*shape]` of an array `[B, HV, NT, *shape]`."""
        zeros = (0,) * len(shape)
        return self._spec((None, None, None, *shape), lambda c, b, h, i: (b, h, c, *zeros))

    def matrix(self) -> pl.BlockSpec:
        """`[C, C]` of an array `[B, HV, NT, C, C]`."""
        return self.array(CHUNK, CHUNK)

    def factors(self) -> pl.BlockSpec:
        """`[13, C]` of `IntraChunk.factors`."""
        return self.array(len(FactorRow), CHUNK)

    def scales(self, scales: Leaf | None) -> Leaf | None:
        """`[...]` of arrays `[B, HV, NT, ...]`."""
        return jax.tree.map(lambda x: self.array(*x.shape[3:]), scales)

    def scale(self) -> pl.BlockSpec:
        """`[1]` of an array of scales `[B, HV, NT, blocks]`, that of the program's block."""
        return self._spec((None, None, None, 1), lambda c, b, h, i: (b, h, c, i))

    def values(self, values: Values) -> Values:
        """`[C, V]`."""
        z = self._z
        return Values(self.tokens(z.value_dim, z.value_heads), self.scales(values.scale))

    def states(self, states: States, key_block: int, value_block: int, *, cut: str) -> States:
        """`[key_block, value_block]` of each chunk's states, cut along "k" or "v"."""
        spec = self._spec(
            (None, None, None, key_block, value_block),
            lambda c, b, h, i: (b, h, c, i, 0) if cut == "k" else (b, h, c, 0, i),
        )
        return States(spec, spec, self.scales(states.scale))

    def part(self) -> pl.BlockSpec:
        """`[GRADIENT_ROWS, C]` of an array `[B, HV, NT, blocks, GRADIENT_ROWS, C]`."""
        return self._spec(
            (None, None, None, None, GRADIENT_ROWS, CHUNK),
            lambda c, b, h, i: (b, h, c, i, 0, 0),
        )


class WalkSpecs:
    """Grid and block specifications of a kernel that walks over the chunks of a head.

    A program takes a block of V of one head. The grid is (block of V, b, h), or, of a launch of
    halves, flat: all first halves in this order, then all second ones.
    """

    def __init__(self, sizes: Sizes, value_block: int, launch: Launch | None = None) -> None:
        self._z, self._block, self._launch = sizes, value_block, launch
        self._walks = (sizes.value_dim // value_block, sizes.batch, sizes.value_heads)

    @property
    def walks(self) -> int:
        """Programs over whole walks."""
        return math.prod(self._walks)

    @property
    def grid(self) -> tuple[int, ...]:
        """Programs of the kernel."""
        return self._walks if self._launch is None else (self._launch.programs,)

    def stretch(self, *, back: bool = False) -> tuple[int | jax.Array, int | jax.Array]:
        """First and end of the chunks that the present program takes in order, or `back`."""
        chunks = self._z.chunks
        if self._launch is None:
            return 0, chunks
        half = lax.div(pl.program_id(0) + self._launch.first, self.walks)
        late, cut = 1 - half if back else half, chunks // 2
        return late * cut, cut + late * (chunks - cut)

    def _spec(self, shape: tuple[int | None, ...], index: Callable[..., tuple]) -> pl.BlockSpec:
        if self._launch is None:
            return pl.BlockSpec(shape, index)
        first, (blocks, batch, _) = self._launch.first, self._walks

        def indices(program: jax.Array) -> tuple:
            walk = lax.rem(program + first, self.walks)
            rest = lax.div(walk, blocks)
            return index(lax.rem(walk, blocks), lax.rem(rest, batch), lax.div(rest, batch))

        return pl.BlockSpec(shape, indices)

    def keys(self, heads: int) -> pl.BlockSpec:
        """`[T, K]` of an array `[B, T, heads, K]`."""
        share, z = self._z.value_heads // heads, self._z
        return self._spec((None, z.length, None, z.key_dim), lambda i, b, h: (b, 0, h // share, 0))

    def of_pieces(self, spoiled: jax.Array) -> pl.BlockSpec:
        """`[pieces]` of an array `[B, HV, pieces, blocks]`."""
        return self._spec((None, None, spoiled.shape[2], None), lambda i, b, h: (b, h, 0, i))

    def values(self) -> pl.BlockSpec:
        """`[T, block]` of an array `[B, T, HV, V]`."""
        return self._spec((None, self._z.length, None, self._block), lambda i, b, h: (b, 0, h, i))

    def array(self, *shape: int) -> pl.BlockSpec:
        """`[NT, *shape]` of an array `[B, HV, NT, *shape]`."""
        zeros = (0,) * len(shape)
        return self._spec((None, None, self._z.chunks, *shape), lambda i, b, h: (b, h, 0, *zeros))

    def matrix(self) -> pl.BlockSpec:
        """`[NT, C, C]` of an array `[B, HV, NT, C, C]`."""
        return self.array(CHUNK, CHUNK)

    def factors(self) -> pl.BlockSpec:
        """`[NT, 13, C]` of `IntraChunk.factors`."""
        return self.array(len(FactorRow), CHUNK)

    def memory(self) -> Memory:
        """`[K, block]` of a memory `[B, HV, K, V]`."""
        shape = (None, None, self._z.key_dim, self._block)
        spec = self._spec(shape, lambda i, b, h: (b, h, 0, i))
        return Memory(spec, spec)

    def scales(self, dtype: jnp.dtype) -> pl.BlockSpec | None:
        """`[NT]` of an array of scales `[B, HV, NT, blocks]`, for data of `dtype`."""
        if dtype != jnp.float16:
            return None
        return self._spec((None, None, self._z.chunks, None), lambda i, b, h: (b, h, 0, i))

    def scales_of(self, scale: Leaf | None) -> pl.BlockSpec | None:
        """`[NT]` of scales `[B, HV, NT, blocks]` of blocks as wide as the walk's or wider."""
        if scale is None:
            return None
        share = self._walks[0] // scale.shape[3]
        shape = (None, None, self._z.chunks, None)
        return self._spec(shape, lambda i, b, h: (b, h, 0, lax.div(i, share)))

    def states(self, dtype: jnp.dtype) -> States:
        """`[NT, K, block]` of the states of every chunk."""
        shape = (None, None, self._z.chunks, self._z.key_dim, self._block)
        spec = self._spec(shape, lambda i, b, h: (b, h, 0, 0, i))
        return States(spec, spec, self.scales(dtype))


class Place(NamedTuple):
    """What a program of `PieceSpecs` walks.

    Attributes:
      piece: number of the piece, from the row's start.
      slot: the same among the pieces of the launch.
      block: of V; below zero for the columns of the map, the last of which is -1.
    """

    piece: jax.Array
    slot: jax.Array
    block: jax.Array

    @property
    def has_values(self) -> jax.Array:
        """Whether it walks columns of V."""
        return self.block >= 0


def first_chunk(piece: jax.Array, chunks: int, pieces: int) -> jax.Array:
    """Of a piece: where they are not of one length the first ones have a chunk more.

    So written the state pass backward spills fewer registers than with `piece * chunks // pieces`.
    """
    each, more = divmod(chunks, pieces)
    return piece * each + jnp.minimum(piece, more) if more else piece * each


class PieceSpecs(WalkSpecs):
    """Those of a launch that walks over all pieces of a row but one, or all, side by side.

    The grid is (block of a piece, b, h), the blocks of a piece beside each other, those of its map
    before those of V. The first piece has no map, unless all pieces are walked.
    """

    def __init__(
        self,
        sizes: Sizes,
        value_block: int,
        pieces: int,
        *,
        first: int,
        maps: bool = False,
        every: bool = False,
    ) -> None:
        """Of the pieces from `first`, 0 or 1, with the columns of their `maps` or without.

        All but one of the pieces, or `every` one of them.
        """
        super().__init__(sizes, value_block)
        self._pieces, self._first = pieces, first
        self._count = pieces if every else pieces - 1
        # the map has as many columns as both states have rows
        self._maps = 2 * sizes.key_dim // value_block if maps else 0
        self._mapless = 0 if every else 1

    @property
    def grid(self) -> tuple[int, ...]:
        """Programs of the kernel."""
        blocks, batch, heads = self._walks
        each = self._maps + blocks
        return (self._count * each - self._mapless * self._maps, batch, heads)

    def place(self, program: jax.Array | None = None) -> Place:
        """Of a program by its first number; None: of the present one."""
        number = pl.program_id(0) if program is None else program
        number += self._mapless * self._maps
        each = self._maps + self._walks[0]
        slot = lax.div(number, each)
        return Place(slot + self._first, slot, lax.rem(number, each) - self._maps)

    def stretch(self, *, back: bool = False) -> tuple[int | jax.Array, int | jax.Array]:
        """First and end of the chunks of the present program's piece."""
        del back
        piece = self.place().piece
        first, end = (first_chunk(i, self._z.chunks, self._pieces) for i in (piece, piece + 1))
        return first, end

    def map_columns(self, place: Place) -> jax.Array:
        """First column of the map that a program without values has."""
        return (place.block + self._maps) * self._block

    def ends(self) -> pl.BlockSpec:
        """`[2 K, block]` of an array `[B, HV, slots, 2 K, V]`: of the slot and block."""
        rows = 2 * self._z.key_dim

        def index(i: jax.Array, b: jax.Array, h: jax.Array) -> tuple:
            place = self.place(i)
            return b, h, place.slot, 0, jnp.maximum(place.block, 0)

        return pl.BlockSpec((None, None, None, rows, self._block), index)

    def phi(self) -> pl.BlockSpec | None:
        """`[2 K, block]` of an array `[B, HV, maps, 2 K, 2 K]`, of the pieces that have one."""
        if not self._maps:
            return None
        rows = 2 * self._z.key_dim

        def index(i: jax.Array, b: jax.Array, h: jax.Array) -> tuple:
            place = self.place(i)
            column = jnp.minimum(place.block + self._maps, self._maps - 1)
            return b, h, jnp.maximum(place.slot - self._mapless, 0), 0, column

        return pl.BlockSpec((None, None, None, rows, self._block), index)

    def spoiled(self) -> pl.BlockSpec:
        """`[1]` of an array `[B, HV, slots, blocks]`."""

        def index(i: jax.Array, b: jax.Array, h: jax.Array) -> tuple:
            place = self.place(i)
            return b, h, place.slot, place.block

        return pl.BlockSpec((None, None, None, 1), index)

    def _spec(self, shape: tuple[int | None, ...], index: Callable[..., tuple]) -> pl.BlockSpec:
        def indices(i: jax.Array, b: jax.Array, h: jax.Array) -> tuple:
            return index(jnp.maximum(self.place(i).block, 0), b, h)

        return pl.BlockSpec(shape, indices)
