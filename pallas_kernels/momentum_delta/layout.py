"""Arrays of one call as the kernels see them, and the block specifications to read them.

Kernels come in two kinds: those of one chunk, whose grid is flat (blocks of a chunk side by side,
then heads, chunks, rows of the batch), and those that walk the chunks of a head in order, whose
grid is (block of V, b, h). A kernel's operands and
results are named tuples; its body gets the same tuples with references in place of arrays, and None
for the erase key that is not there.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import PARTS, Precision, exact
from pallas_kernels.tiling import Tiles

Leaf = Any
"""An array; in specifications and kernel bodies, what stands for it there."""

CHUNK = 64
"""Steps in a chunk. The matrices inside a chunk are `[CHUNK, CHUNK]`."""
HALF = CHUNK // 2
"""Steps that gates are turned into coefficients for at once."""
HALVES = (pl.ds(0, HALF), pl.ds(HALF, HALF))
"""The two halves of a chunk, as indices."""

# rows of `Prepared.factors`: what scales the rows of P, K, Q in the products with the states (of P
# and K as the walks have them, `WalkKeys`) ...
READ_S, READ_N, WRITE_S, WRITE_N, QUERY_S, QUERY_N = range(6)
# ... what carries the states over the chunk, and the norms of q (times scale) and k
KEEP, NORM_Q, NORM_K = range(6, 9)
# for the gradients of the gates: [read.total | read.lead] of the second half, [gamma | w] at the
# end of the first (coefficients.py)
SIGHT_2, ENDS_1 = range(9, 11)
# powers of two by which rows of K and P are multiplied in `WalkKeys`
POWER_K, POWER_P = range(11, 13)
FACTORS = 13
# entries of the row KEEP: S_C = ss S_0 + ns N_0 + ..., N_C = nn N_0 + ...
KEEP_SS, KEEP_NS, KEEP_NN = range(3)
# the end of the first half, and how much momentum the second keeps
TOTAL_1, LEAD_1, MOMENTUM_1, MOMENTUM_2 = range(3, 7)
# how far a chunk of errors of at most 1 moves an element of the states, and how far gradients of
# errors and of outputs of at most 1 move one of their gradients (units.py)
REACH = 7
REACH_READ_S, REACH_READ_N, REACH_WRITE_S, REACH_WRITE_N, REACH_QUERY_S, REACH_QUERY_N = (
    REACH + row for row in range(QUERY_N + 1)
)
# unit of `Prepared.mixing` in float16, for the largest sum of sizes in a row or a column of it
MIXING_UNIT = 13
# gradients come back for the first seven rows
ROW_GRADIENTS = 7


class Options(NamedTuple):
    """What is fixed when the rule is traced.

    Attributes:
      scale: factor on the output.
      normalize: l2-normalise q and k.
      tiles: block shapes, warps, stages.
      precise: of bfloat16 inputs: what the kernels keep and hand on is float32.
      interpret: run the kernels in the interpreter, on any device.
    """

    scale: float
    normalize: bool
    tiles: Tiles
    precise: bool
    interpret: bool

    def operands(self, dtype: jnp.dtype) -> jnp.dtype:
        """Of matrices inside a chunk and of products with keys, where q is of `dtype`."""
        return jnp.dtype(jnp.float32) if self.precise else dtype

    def storage(self, dtype: jnp.dtype) -> jnp.dtype:
        """Of states, errors and their gradients between the kernels, where q is of `dtype`.

        float16 comes in units of its own (units.py).
        """
        return jnp.dtype(jnp.float32 if self.operands(dtype) == jnp.float32 else jnp.float16)

    @property
    def products(self) -> Precision:
        """Of float32 operands."""
        return PARTS if self.precise else exact(self.interpret)


class Tokens(NamedTuple):
    """Arrays with a time axis; `T` is a multiple of `CHUNK`.

    Attributes:
      q: `[B, T, H, K]`, bfloat16, float16 or float32 as all but the gates.
      k: `[B, T, H, K]`.
      v: `[B, T, HV, V]`.
      p: `[B, T, H or HV, K]`, or None for `alpha` times the normalised key.
      log_alpha: `[B, T, HV]` float32, as the other gates.
      log_mu: `[B, T, HV]`.
      beta: `[B, T, HV]`.
      eta: `[B, T, HV]`.
    """

    q: Leaf
    k: Leaf
    v: Leaf
    p: Leaf | None
    log_alpha: Leaf
    log_mu: Leaf
    beta: Leaf
    eta: Leaf

    @property
    def sizes(self) -> "Sizes":
        """The static sizes of the call."""
        batch, length, heads, key_dim = self.q.shape
        p_heads = heads if self.p is None else self.p.shape[2]
        return Sizes(batch, length, heads, p_heads, self.v.shape[2], key_dim, self.v.shape[3])


class Memory(NamedTuple):
    """Memory and momentum as callers have them, `[B, HV, K, V]` float32."""

    s: Leaf
    m: Leaf


class States(NamedTuple):
    """Memory and negated momentum of each chunk, or their gradients.

    Attributes:
      s: `[B, HV, NT, K, V]`, in the storage dtype.
      n: the same.
      unit: what float16 counts in, `[B, HV, NT, blocks of V]` float32; None: 1.
    """

    s: Leaf
    n: Leaf
    unit: Leaf | None


class Values(NamedTuple):
    """What has the shape of the values.

    Attributes:
      data: `[B, T, HV, V]`.
      unit: what float16 counts in, `[B, HV, NT, blocks of V]` float32; None: 1.
    """

    data: Leaf
    unit: Leaf | None


class WalkKeys(NamedTuple):
    """Keys as the walks multiply states by them.

    In float16 where the states are: rows times the powers of two that make them about 1 long, which
    loses nothing of bfloat16's 8 digits.

    Attributes:
      k: `[B, T, H, K]`.
      p: `[B, T, H or HV, K]`, or None.
    """

    k: Leaf
    p: Leaf | None


class Prepared(NamedTuple):
    """What the gates, keys and queries of a chunk give, whatever the states.

    Attributes:
      attention: `tril(Q K^T * gamma * eta) * scale`, `[B, HV, NT, C, C]`, in the operands' dtype.
      mixing: `(I + L)^-1 - I`, what a step's error takes from earlier ones of the chunk, same
        shape, in the storage dtype (float16 in the unit MIXING_UNIT).
      factors: row factors `[B, HV, NT, FACTORS, C]` float32.
      keys: in float16; None where the walks take them as they are.
    """

    attention: Leaf
    mixing: Leaf
    factors: Leaf
    keys: WalkKeys | None

    def walk_keys(self, x: Tokens) -> WalkKeys:
        """Those that the walks take."""
        return self.keys or WalkKeys(x.k, x.p)


class Sizes(NamedTuple):
    """Static sizes of a call."""

    batch: int
    length: int
    heads: int
    p_heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    @property
    def chunks(self) -> int:
        """Chunks in a row, `NT`."""
        return self.length // CHUNK

    def per_chunk(self, *shape: int, dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        """`[B, HV, NT, *shape]`."""
        return jax.ShapeDtypeStruct((self.batch, self.value_heads, self.chunks, *shape), dtype)

    def per_head(self, width: int, dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        """`[B, T, HV, width]`."""
        return jax.ShapeDtypeStruct((self.batch, self.length, self.value_heads, width), dtype)

    @property
    def gate(self) -> jax.ShapeDtypeStruct:
        """`[B, T, HV]` float32."""
        return jax.ShapeDtypeStruct((self.batch, self.length, self.value_heads), jnp.float32)

    @property
    def memory(self) -> Memory:
        """Both `[B, HV, K, V]` float32."""
        shape = (self.batch, self.value_heads, self.key_dim, self.value_dim)
        state = jax.ShapeDtypeStruct(shape, jnp.float32)
        return Memory(state, state)

    def units(self, block: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct | None:
        """One for each chunk and `block` columns of V, for data of `dtype`."""
        if dtype != jnp.float16:
            return None
        return self.per_chunk(self.value_dim // block, dtype=jnp.float32)

    def states(self, block: int, dtype: jnp.dtype) -> States:
        """A pair of states for each chunk, in units for `block` columns of V."""
        kept = self.per_chunk(self.key_dim, self.value_dim, dtype=dtype)
        return States(kept, kept, self.units(block, dtype))


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
        """`[FACTORS, C]` of `Prepared.factors`."""
        return self.array(FACTORS, CHUNK)

    def units(self, units: Leaf | None) -> Leaf | None:
        """`[...]` of arrays `[B, HV, NT, ...]`."""
        return jax.tree.map(lambda x: self.array(*x.shape[3:]), units)

    def unit(self) -> pl.BlockSpec:
        """`[1]` of an array of units `[B, HV, NT, blocks]`, that of the program's block."""
        return self._spec((None, None, None, 1), lambda c, b, h, i: (b, h, c, i))

    def values(self, values: Values) -> Values:
        """`[C, V]`."""
        z = self._z
        return Values(self.tokens(z.value_dim, z.value_heads), self.units(values.unit))

    def states(self, states: States, key_block: int, value_block: int, *, cut: str) -> States:
        """`[key_block, value_block]` of each chunk's states, cut along "k" or "v"."""
        spec = self._spec(
            (None, None, None, key_block, value_block),
            lambda c, b, h, i: (b, h, c, i, 0) if cut == "k" else (b, h, c, 0, i),
        )
        return States(spec, spec, self.units(states.unit))

    def part(self) -> pl.BlockSpec:
        """`[ROW_GRADIENTS, C]` of an array `[B, HV, NT, blocks, ROW_GRADIENTS, C]`."""
        return self._spec(
            (None, None, None, None, ROW_GRADIENTS, CHUNK),
            lambda c, b, h, i: (b, h, c, i, 0, 0),
        )


class Launch(NamedTuple):
    """Some of the programs of a kernel that walks over chunks.

    Attributes:
      first: number of the first.
      programs: how many.
    """

    first: int
    programs: int


_ROUNDS_IN_HALVES = 3
"""Of whole walks, at most, to be cut."""


def launches(walks: int, resident: int | None) -> list[Launch | None]:
    """One launch of whole walks, or several of halves where that leaves the device less idle.

    A device that runs `resident` programs at once takes `ceil(walks / resident)` rounds, the last
    one with what is left. In halves, twice as many programs take half the time each, and more of
    the rounds are full. Launches end between rounds, so that no second half of a walk is in the
    launch of its first, whose states it continues. Of more than three rounds halves save an eighth
    at most, and each launch is a kernel to compile: those stay whole.

    Args:
      walks: programs over whole walks.
      resident: programs that run at once; None: not known.

    Returns:
      The launches of all `2 * walks` halves, first halves first; or None, the launch of the whole.
    """
    if resident is None or not resident < walks <= _ROUNDS_IN_HALVES * resident:
        return [None]
    rounds = pl.cdiv(2 * walks, resident)
    if rounds == 2 * pl.cdiv(walks, resident):
        return [None]
    size = pl.cdiv(2 * walks, rounds)
    return [Launch(first, min(size, 2 * walks - first)) for first in range(0, 2 * walks, size)]


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
        """`[NT, FACTORS, C]` of `Prepared.factors`."""
        return self.array(FACTORS, CHUNK)

    def memory(self) -> Memory:
        """`[K, block]` of a memory `[B, HV, K, V]`."""
        shape = (None, None, self._z.key_dim, self._block)
        spec = self._spec(shape, lambda i, b, h: (b, h, 0, i))
        return Memory(spec, spec)

    def units(self, dtype: jnp.dtype) -> pl.BlockSpec | None:
        """`[NT]` of an array of units `[B, HV, NT, blocks]`, for data of `dtype`."""
        if dtype != jnp.float16:
            return None
        return self._spec((None, None, self._z.chunks, None), lambda i, b, h: (b, h, 0, i))

    def units_of(self, unit: Leaf | None) -> pl.BlockSpec | None:
        """`[NT]` of units `[B, HV, NT, blocks]` whose blocks are as wide as the walk's or wider."""
        if unit is None:
            return None
        share = self._walks[0] // unit.shape[3]
        shape = (None, None, self._z.chunks, None)
        return self._spec(shape, lambda i, b, h: (b, h, 0, lax.div(i, share)))

    def kept(self, dtype: jnp.dtype) -> States:
        """`[NT, K, block]` of the states of every chunk."""
        shape = (None, None, self._z.chunks, self._z.key_dim, self._block)
        spec = self._spec(shape, lambda i, b, h: (b, h, 0, 0, i))
        return States(spec, spec, self.units(dtype))


def iotas(size: int = CHUNK) -> tuple[jax.Array, jax.Array]:
    """Row and column numbers of a `[size, size]` matrix."""
    shape = (size, size)
    return lax.broadcasted_iota("int32", shape, 0), lax.broadcasted_iota("int32", shape, 1)


def lanes(size: int = CHUNK) -> jax.Array:
    """`0 .. size - 1`."""
    return lax.broadcasted_iota("int32", (size,), 0)
