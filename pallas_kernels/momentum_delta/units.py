"""float16 in units: 11 digits in two bytes, whatever the size of the numbers.

States, errors and their gradients are float16 where the inputs have 16 bits, between the kernels
and as operands of the walks. bfloat16's 8 digits are too few there: gradients of gates are sums in
which these nearly cancel (docs/kernels.md, "How exact"). float16 ends at 65,504 and is short of
digits below 6e-5, so each tile of a chunk has a unit, a power of two, and holds multiples of it of
at most 2^14.

The walks know the units of errors and states without a look at them: from the largest residual of a
chunk, what `X` can make of it (`ChunkScalar.INVERSE_SCALE`), and how far errors can move a state
(`rows.REACHES`). Such bounds may be far above the numbers: float16 keeps 11 digits of what is up to
2^28 times smaller than the bound.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lowering import Precision, dot
from pallas_kernels.momentum_delta.fragments import Fragments
from pallas_kernels.momentum_delta.types import CHUNK, Leaf, States, Values

DTYPE = jnp.dtype(jnp.float16)
_EXPONENT, _INVERSE = 0x7F800000, 0x7F000000  # bits of a float32; of x, _INVERSE - x is 1 / x
_DOUBLINGS = 13
_LEAST, _MOST = 2.0**-120, 2.0**120
SHORTEST = 2.0**-40
"""Length of a key below which `types.WalkKeys` makes it no longer than it is times 2^40."""


class Unit(NamedTuple):
    """A power of two (or an array of them) and its inverse, float32."""

    size: jax.Array
    inverse: jax.Array


class Bounds(NamedTuple):
    """No element of what a walk carries is larger; it is carried in `units`.

    Memory and momentum have a unit each: one may be 2^40 times smaller than the other, as gradients
    of a lost momentum are.

    Attributes:
      s: of the memory.
      n: of the negated momentum.
    """

    s: jax.Array
    n: jax.Array

    @property
    def units(self) -> tuple[Unit, Unit]:
        """Of both."""
        return unit_of(self.s), unit_of(self.n)


def power_of_two(size: jax.Array) -> Unit:
    """The largest that is at most `size`, float32."""
    bits = lax.bitcast_convert_type(jnp.clip(size, _LEAST, _MOST), jnp.int32) & _EXPONENT
    return Unit(
        lax.bitcast_convert_type(bits, jnp.float32),
        lax.bitcast_convert_type(_INVERSE - bits, jnp.float32),
    )


def unit_of(bound: jax.Array) -> Unit:
    """For numbers of at most `bound` in size, which become at most `2^14`."""
    size, inverse = power_of_two(jnp.maximum(bound, 2.0**-100))
    return Unit(size * 2.0**-_DOUBLINGS, inverse * 2.0**_DOUBLINGS)


def most(size: jax.Array) -> jax.Array:
    """What numbers in a unit of `size` are at most."""
    return size * 2.0 ** (_DOUBLINGS + 1)


def largest(tile: jax.Array) -> jax.Array:
    """The size of the largest element."""
    return jnp.max(jnp.abs(tile))


class Stored(NamedTuple):
    """What is stored of a float32 tile.

    Attributes:
      tile: float16, in a unit.
      unit: its size.
      largest: no element of the tile is larger.
    """

    tile: jax.Array
    unit: jax.Array
    largest: jax.Array


def stored(tile: jax.Array, bound: jax.Array | None = None) -> Stored:
    """A tile in a unit for elements of at most `bound`, or for its largest one."""
    size = largest(tile) if bound is None else bound
    unit = unit_of(size)
    return Stored((tile * unit.inverse).astype(DTYPE), unit.size, size)


def mixed(
    rows: jax.Array, mixing: jax.Array, unit: jax.Array | None, precision: Precision | None
) -> tuple[jax.Array, Stored | None]:
    """`rows + mixing @ rows`; what is added to is not rounded.

    Args:
      rows: `[C, block]` float32.
      mixing: `[C, C]`.
      unit: of `mixing`, which is float16 then; None: it is float32.
      precision: of the product of float32.

    Returns:
      The sum in float32, and in float16 as it is stored (None for a float32 `mixing`).
    """
    if unit is None:
        return rows + dot(mixing, rows, precision), None
    operand = stored(rows)
    result = rows + dot(mixing, operand.tile, precision) * (operand.unit * unit)
    # of the largest row alone: that of the result would be another wait of all warps for each other
    bound = operand.largest * (1 + most(unit))
    return result, stored(result, bound)


def enter(
    s: jax.Array, n: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, Bounds | None]:
    """States at the start of a walk that stores `dtype`, in units if that is float16."""
    if dtype != DTYPE:
        return s, n, None
    bounds = Bounds(largest(s), largest(n))
    unit_s, unit_n = bounds.units
    return s * unit_s.inverse, n * unit_n.inverse, bounds


def leave(s: jax.Array, n: jax.Array, bounds: Bounds | None) -> tuple[jax.Array, jax.Array]:
    """States at the end of a walk as they are."""
    if bounds is None:
        return s, n
    unit_s, unit_n = bounds.units
    return s * unit_s.size, n * unit_n.size


def store_states(
    ref: States,
    chunk: jax.Array,
    s: jax.Array,
    n: jax.Array,
    units: tuple[Unit, Unit] | None,
    values: Fragments,
) -> None:
    """Stores what a walk carries at a chunk, float32, as float16 in the larger of its units.

    Args:
      ref: of all chunks.
      chunk: its number.
      s: memory or gradient, `[K, block]`.
      n: negated momentum or gradient, same shape.
      units: of both; None: they are stored as they are.
      values: the order of columns.
    """
    if units is not None and ref.unit is not None:
        inverse = jnp.minimum(units[0].inverse, units[1].inverse)
        s, n = (
            (tile * (unit.size * inverse)).astype(DTYPE)
            for tile, unit in zip((s, n), units, strict=True)
        )
        ref.unit[chunk] = jnp.maximum(units[0].size, units[1].size)
    values.store(s, ref.s, chunk)
    values.store(n, ref.n, chunk)


def columns(units: Leaf, value_dim: int, first: jax.Array | int, count: int) -> jax.Array:
    """Units of `count` columns of V from `first`, `[count]`.

    Args:
      units: `[blocks]`, each of as many columns.
      value_dim: V.
      first: column.
      count: of columns.
    """
    column = first + lax.broadcasted_iota("int32", (count,), 0)
    return units[lax.div(column, value_dim // units.shape[0])]


class Sums(NamedTuple):
    """Units of sums over V whose operands have units of their own in each block of V.

    Attributes:
      unit: of each sum, `[B, HV, NT, sums]` float32.
      columns: what takes a product to it, by column of V, `[B, HV, NT, sums, V]` float32, at most 1
        (with `OUTPUT` d_o has no unit, so that it is more).
    """

    unit: Leaf
    columns: Leaf


# of `sums_with_states`: d_v with states, errors with gradients of states, d_o with states, and
# gradients of states with states
READ, WRITE, QUERY, KEEP = range(4)
# of `sums_with_errors`: d_o with errors, d_v with errors
OUTPUT, ERROR = range(2)


def sums_with_states(d_v: Values, error: Values, kept: States, d_kept: States) -> Sums | None:
    """Outside of kernels; None for float32."""
    units = _by_block(d_v, error, kept, d_kept)
    if units is None:
        return None
    of_v, of_error, of_s, of_ds = units
    products = jnp.stack([of_v * of_s, of_error * of_ds, of_s, of_ds * of_s], axis=3)
    unit = _unit_of_sums(products)
    return Sums(unit, _by_column(products / unit[..., None], d_v))


def sums_with_errors(d_o: Values, d_v: Values, error: Values) -> Sums | None:
    """Outside of kernels; None for float32.

    Args:
      d_o: itself, with the unit that it needs in float16.
      d_v: in units.
      error: in units.
    """
    units = _by_block(d_o, d_v, error)
    if units is None:
        return None
    of_o, of_v, of_error = units
    # in the order of OUTPUT and ERROR
    unit = _unit_of_sums(jnp.stack([of_o * of_error, of_v * of_error], axis=3))
    factors = jnp.stack([of_error, of_v * of_error], axis=3) / unit[..., None]
    return Sums(unit, _by_column(factors, d_v))


def _by_block(*tiles: Values | States) -> list[jax.Array] | None:
    """Their units for the narrowest blocks of V among them, `[B, HV, NT, blocks]`."""
    units = [x.unit for x in tiles if x.unit is not None]
    blocks = max((x.shape[3] for x in units), default=0)
    return [jnp.repeat(x, blocks // x.shape[3], axis=3) for x in units] or None


def _by_column(blocks: jax.Array, like: Values) -> jax.Array:
    """`[..., blocks]` for each column of V."""
    return jnp.repeat(blocks, like.data.shape[3] // blocks.shape[-1], axis=-1)


def _unit_of_sums(products: jax.Array) -> jax.Array:
    """Units `[B, HV, NT, sums]` of sums of products `[B, HV, NT, sums, blocks]` of units."""
    # of nothing but zeros the product of units may be zero
    return jnp.maximum(jnp.max(products, axis=4), _LEAST)


def whole(values: Values, dtype: jnp.dtype) -> jax.Array:
    """The values themselves, `[B, T, HV, V]`, outside of kernels."""
    if values.unit is None:
        return values.data.astype(dtype)
    batch, length, heads, value_dim = values.data.shape
    blocks = values.unit.shape[3]
    unit = values.unit.transpose(0, 2, 1, 3)[:, :, None, :, :, None]
    tiles = values.data.reshape(
        batch, length // CHUNK, CHUNK, heads, blocks, value_dim // blocks
    ).astype(jnp.float32)
    return (tiles * unit).astype(dtype).reshape(values.data.shape)
