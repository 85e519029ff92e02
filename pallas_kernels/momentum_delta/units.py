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


# what adds up over V in the gradients of a chunk: d_v with states, errors with gradients of states,
# d_o with states, gradients of states with states, d_o with errors, d_v with errors
READ, WRITE, QUERY, KEEP, OUTPUT, ERROR = range(6)


class Sums(NamedTuple):
    """Units of sums over V whose operands have units of their own in each block of V.

    Attributes:
      unit: of each sum, `[B, HV, NT, 6]` float32.
      columns: what takes a product to it, by column of V, `[B, HV, NT, 6, V]` float32; at most 1,
        but for `QUERY` and `OUTPUT`, where d_o has no unit.
    """

    unit: Leaf
    columns: Leaf


def sums(d_o: Values, d_v: Values, error: Values, kept: States, d_kept: States) -> Sums | None:
    """Outside of kernels. `d_o` is itself, with the unit that it needs in float16.

    Returns:
      None for float32.
    """
    value_dim = d_o.data.shape[3]
    units = [x.unit for x in (d_o, d_v, error, kept, d_kept) if x.unit is not None]
    if not units:
        return None
    of_o, of_v, of_error, of_s, of_ds = (
        jnp.repeat(unit, value_dim // unit.shape[3], axis=3) for unit in units
    )
    products = [of_v * of_s, of_error * of_ds, of_s, of_ds * of_s, of_o * of_error, of_v * of_error]
    # of nothing but zeros the product of units may be zero
    unit = [jnp.maximum(jnp.max(x, axis=3), _LEAST) for x in products]
    products[OUTPUT] = of_error
    columns = [x / size[..., None] for x, size in zip(products, unit, strict=True)]
    return Sums(jnp.stack(unit, axis=3), jnp.stack(columns, axis=3))


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
