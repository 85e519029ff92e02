"""float16 in units: 11 digits in two bytes, whatever the size of the numbers.

States, errors and their gradients go from kernel to kernel as float16 where the inputs have 16
bits. bfloat16's 8 digits are too few there: gradients of gates are sums in which these nearly
cancel (docs/kernels.md, "How exact"). float16 ends at 65,504 and is short of digits below 6e-5, so
each tile of a chunk has a unit, a power of two, and holds multiples of it of at most 2^14.

The walks know the unit of their states without a look at them: from the largest error of a chunk
and how far errors can move a state (`layout.REACH_WRITE`). Such a bound may be far above the
states: float16 keeps 11 digits of what is up to 2^28 times smaller than the bound.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.momentum_delta.layout import CHUNK, Leaf, States, Values

DTYPE = jnp.dtype(jnp.float16)
_EXPONENT, _INVERSE = 0x7F800000, 0x7F000000  # bits of a float32; of x, _INVERSE - x is 1 / x
_DOUBLINGS = 13
_LEAST, _MOST = 2.0**-120, 2.0**120


class Unit(NamedTuple):
    """A power of two (or an array of them) and its inverse, float32."""

    size: jax.Array
    inverse: jax.Array


class Range(NamedTuple):
    """Of the states that a walk carries.

    Attributes:
      bound: no element is larger.
      unit: that they are in.
    """

    bound: jax.Array
    unit: Unit


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
      largest: the size of the tile's largest element.
    """

    tile: jax.Array
    unit: jax.Array
    largest: jax.Array


def stored(tile: jax.Array) -> Stored:
    """A tile in the unit of its largest element."""
    size = largest(tile)
    unit = unit_of(size)
    return Stored((tile * unit.inverse).astype(DTYPE), unit.size, size)


def enter(states: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, Range | None]:
    """States at the start of a walk that stores `dtype`, in a unit if that is float16."""
    if dtype != DTYPE:
        return states, None
    bound = largest(states)
    unit = unit_of(bound)
    return states * unit.inverse, Range(bound, unit)


def leave(states: jax.Array, carried: Range | None) -> jax.Array:
    """States at the end of a walk as they are."""
    return states if carried is None else states * carried.unit.size


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
    units = _by_column(d_v, error, kept, d_kept)
    if units is None:
        return None
    of_v, of_error, of_s, of_ds = units
    return _sums([of_v * of_s, of_error * of_ds, of_s, of_ds * of_s])


def sums_with_errors(d_o: Values, d_v: Values, error: Values) -> Sums | None:
    """Outside of kernels; None for float32.

    Args:
      d_o: itself, with the unit that it needs in float16.
      d_v: in units.
      error: in units.
    """
    units = _by_column(d_o, d_v, error)
    if units is None:
        return None
    of_o, of_v, of_error = units
    sums = _sums([of_o * of_error, of_v * of_error])
    output = of_error / sums.unit[..., OUTPUT, None]
    return sums._replace(columns=sums.columns.at[..., OUTPUT, :].set(output))


def _by_column(*tiles: Values | States) -> list[jax.Array] | None:
    """The unit of each column, `[B, HV, NT, V]`."""
    units = [x.unit for x in tiles if x.unit is not None]
    value_dim = jax.tree.leaves(tiles[0])[0].shape[3]
    return [jnp.repeat(x, value_dim // x.shape[3], axis=3) for x in units] or None


def _sums(products: list[jax.Array]) -> Sums:
    """Of the products of the operands' units."""
    stacked = jnp.stack(products, axis=3)
    # of nothing but zeros the product of units may be zero
    unit = jnp.maximum(jnp.max(stacked, axis=4), _LEAST)
    return Sums(unit, stacked / unit[..., None])


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
