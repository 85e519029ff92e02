"""Block scaling: float16 between the kernels, 11 digits in two bytes, whatever the size.

States, v_new and their gradients are float16 where the inputs have 16 bits, between the kernels and
as operands of the state passes. bfloat16's 8 digits are too few there: gradients of gates are sums
in which these nearly cancel (docs/numerics.md). float16 ends at 65,504 and is short of digits below
6e-5, so each tile of a chunk has a scale, a power of two, and holds multiples of it of at most
2^14.

The state passes know the scales of v_new and of the states without a look at them: from the largest
residual of a chunk, what the inverse can make of it (`ChunkScalar.INVERSE_SCALE`), and how far
v_new can move a state (`rows.REACHES`). Such bounds may be far above the numbers: float16 keeps 11
digits of what is up to 2^28 times smaller than the bound.
"""

from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lowering import Precision, dot
from pallas_kernels.momentum_delta.register_layout import RegisterLayout, store_where
from pallas_kernels.momentum_delta.types import CHUNK, Leaf, States, Values

FLOAT16 = jnp.dtype(jnp.float16)
_EXPONENT, _INVERSE = 0x7F800000, 0x7F000000  # bits of a float32; of x, _INVERSE - x is 1 / x
_DOUBLINGS = 13
_LEAST, _MOST = 2.0**-120, 2.0**120
SHORTEST = 2.0**-40
"""Length of a key below which `types.WalkKeys` makes it no longer than it is times 2^40."""


class Scale(NamedTuple):
    """A power of two (or an array of them) and its inverse, float32."""

    size: jax.Array
    inverse: jax.Array


class Bounds(NamedTuple):
    """No element of what a state pass carries is larger.

    Memory and momentum have a scale each: one may be 2^40 times smaller than the other, as
    gradients of a lost momentum are.

    Attributes:
      s: of the memory.
      n: of the negated momentum.
    """

    s: jax.Array
    n: jax.Array

    @property
    def scales(self) -> tuple[Scale, Scale]:
        """Of both."""
        return scale_for(self.s), scale_for(self.n)


def power_of_two(size: jax.Array) -> Scale:
    """The largest that is at most `size`, float32."""
    bits = lax.bitcast_convert_type(jnp.clip(size, _LEAST, _MOST), jnp.int32) & _EXPONENT
    return Scale(
        lax.bitcast_convert_type(bits, jnp.float32),
        lax.bitcast_convert_type(_INVERSE - bits, jnp.float32),
    )


def scale_for(bound: jax.Array) -> Scale:
    """Scale for numbers of at most `bound` in size, which become at most `2^14`."""
    size, inverse = power_of_two(jnp.maximum(bound, 2.0**-100))
    return Scale(size * 2.0**-_DOUBLINGS, inverse * 2.0**_DOUBLINGS)


def bound_of(size: jax.Array) -> jax.Array:
    """The largest magnitude that numbers of a scale of `size` have."""
    return size * 2.0 ** (_DOUBLINGS + 1)


def max_magnitude(tile: jax.Array) -> jax.Array:
    """Of all elements of a tile."""
    return jnp.max(jnp.abs(tile))


class Quantized(NamedTuple):
    """What is stored of a float32 tile.

    Attributes:
      tile: float16, in multiples of the scale.
      scale: float32.
      max_magnitude: no element of the float32 tile is larger.
    """

    tile: jax.Array
    scale: jax.Array
    max_magnitude: jax.Array


def quantize(tile: jax.Array, bound: jax.Array | None = None) -> Quantized:
    """A tile in a scale for elements of at most `bound`, or for its largest one."""
    size = max_magnitude(tile) if bound is None else bound
    scale = scale_for(size)
    return Quantized((tile * scale.inverse).astype(FLOAT16), scale.size, size)


def apply_inverse(
    rows: jax.Array, inverse: jax.Array, scale: jax.Array | None, precision: Precision | None
) -> tuple[jax.Array, Quantized | None]:
    """`(I + L)^-1 rows`, as `rows + inverse @ rows`: what is added to is not rounded.

    Args:
      rows: `[C, block]` float32.
      inverse: `(I + L)^-1 - I`, `[C, C]`.
      scale: of `inverse`, which is float16 then; None: it is float32.
      precision: of the product of float32.

    Returns:
      The sum in float32, and in float16 as it is stored (None for a float32 `inverse`).
    """
    if scale is None:
        return rows + dot(inverse, rows, precision), None
    operand = quantize(rows)
    result = rows + dot(inverse, operand.tile, precision) * (operand.scale * scale)
    # of the largest row alone: that of the result would be another wait of all warps for each other
    bound = operand.max_magnitude * (1 + bound_of(scale))
    return result, quantize(result, bound)


def scale_states(
    s: jax.Array, n: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, Bounds | None]:
    """States at the start of a pass that stores `dtype`, in scales if that is float16."""
    if dtype != FLOAT16:
        return s, n, None
    bounds = Bounds(max_magnitude(s), max_magnitude(n))
    scale_s, scale_n = bounds.scales
    return s * scale_s.inverse, n * scale_n.inverse, bounds


def unscale_states(
    s: jax.Array, n: jax.Array, bounds: Bounds | None
) -> tuple[jax.Array, jax.Array]:
    """States at the end of a pass as they are."""
    if bounds is None:
        return s, n
    scale_s, scale_n = bounds.scales
    return s * scale_s.size, n * scale_n.size


def store_states(
    ref: States,
    chunk: jax.Array,
    s: jax.Array,
    n: jax.Array,
    scales: tuple[Scale, Scale] | None,
    layout: RegisterLayout,
    where: jax.Array | None = None,
) -> None:
    """Stores what a pass carries at a chunk, float32, as float16 in the larger of its scales.

    Args:
      ref: of all chunks.
      chunk: its number.
      s: memory or gradient, `[K, block]`.
      n: negated momentum or gradient, same shape.
      scales: of both; None: they are stored as they are.
      layout: the order of columns.
      where: a scalar; if False nothing is stored.
    """
    if scales is not None and ref.scale is not None:
        inverse = jnp.minimum(scales[0].inverse, scales[1].inverse)
        s, n = (
            (tile * (scale.size * inverse)).astype(FLOAT16)
            for tile, scale in zip((s, n), scales, strict=True)
        )
        store_where(ref.scale, chunk, jnp.maximum(scales[0].size, scales[1].size), where)
    layout.store(s, ref.s, chunk, where=where)
    layout.store(n, ref.n, chunk, where=where)


def store_values(
    ref: Values,
    chunk: jax.Array,
    first: jax.Array,
    tile: jax.Array,
    quantized: Quantized | None,
    layout: RegisterLayout,
    where: jax.Array | None = None,
) -> None:
    """Stores what a pass gives of a chunk's steps.

    Args:
      ref: of all chunks.
      chunk: its number.
      first: its first step.
      tile: `[C, block]` float32.
      quantized: the same in a scale; None: it is stored as it is.
      layout: the order of columns.
      where: a scalar; if False nothing is stored.
    """
    if quantized is None:
        layout.store(tile, ref.data, first=first, where=where)
    else:
        layout.store(quantized.tile, ref.data, first=first, where=where)
        store_where(ref.scale, chunk, quantized.scale, where)


def column_scales(scales: Leaf, value_dim: int, first: jax.Array | int, count: int) -> jax.Array:
    """Scales of `count` columns of V from `first`, `[count]`.

    Args:
      scales: `[blocks]`, each of as many columns.
      value_dim: V.
      first: column.
      count: of columns.
    """
    column = first + lax.broadcasted_iota("int32", (count,), 0)
    return scales[lax.div(column, value_dim // scales.shape[0])]


class SumScales(NamedTuple):
    """Scales of sums over V whose operands have scales of their own in each block of V.

    Attributes:
      scale: of each sum, `[B, HV, NT, sums]` float32.
      columns: what takes a product to it, by column of V, `[B, HV, NT, sums, V]` float32, at most 1
        (with `ScoreSum.OUTPUT` d_o has no scale, so that it is more).
    """

    scale: Leaf
    columns: Leaf


class StateSum(IntEnum):
    """The sums of `scales_with_states`."""

    READ = 0
    """d_v with states."""
    WRITE = 1
    """v_new with gradients of states."""
    QUERY = 2
    """d_o with states."""
    STATES = 3
    """Gradients of states with states."""


class ScoreSum(IntEnum):
    """The sums of `scales_with_v_new`."""

    OUTPUT = 0
    """d_o with v_new."""
    ERASE = 1
    """d_v with v_new."""


def scales_with_states(
    d_v: Values, v_new: Values, states: States, d_states: States
) -> SumScales | None:
    """Outside of kernels; None for float32."""
    scales = _by_block(d_v, v_new, states, d_states)
    if scales is None:
        return None
    of_v, of_v_new, of_s, of_ds = scales
    products = jnp.stack([of_v * of_s, of_v_new * of_ds, of_s, of_ds * of_s], axis=3)
    scale = _scale_of_sums(products)
    return SumScales(scale, _by_column(products / scale[..., None], d_v))


def scales_with_v_new(d_o: Values, d_v: Values, v_new: Values) -> SumScales | None:
    """Outside of kernels; None for float32.

    Args:
      d_o: itself, with the scale that it needs in float16.
      d_v: in scales.
      v_new: in scales.
    """
    scales = _by_block(d_o, d_v, v_new)
    if scales is None:
        return None
    of_o, of_v, of_v_new = scales
    # in the order of `ScoreSum`
    scale = _scale_of_sums(jnp.stack([of_o * of_v_new, of_v * of_v_new], axis=3))
    factors = jnp.stack([of_v_new, of_v * of_v_new], axis=3) / scale[..., None]
    return SumScales(scale, _by_column(factors, d_v))


def _by_block(*tiles: Values | States) -> list[jax.Array] | None:
    """Their scales for the narrowest blocks of V among them, `[B, HV, NT, blocks]`."""
    scales = [x.scale for x in tiles if x.scale is not None]
    blocks = max((x.shape[3] for x in scales), default=0)
    return [jnp.repeat(x, blocks // x.shape[3], axis=3) for x in scales] or None


def _by_column(blocks: jax.Array, like: Values) -> jax.Array:
    """`[..., blocks]` for each column of V."""
    return jnp.repeat(blocks, like.data.shape[3] // blocks.shape[-1], axis=-1)


def _scale_of_sums(products: jax.Array) -> jax.Array:
    """Scales `[B, HV, NT, sums]` of sums of products `[B, HV, NT, sums, blocks]` of scales."""
    # of nothing but zeros the product of scales may be zero
    return jnp.maximum(jnp.max(products, axis=4), _LEAST)


def dequantize(values: Values, dtype: jnp.dtype) -> jax.Array:
    """The values themselves, `[B, T, HV, V]`, outside of kernels."""
    if values.scale is None:
        return values.data.astype(dtype)
    batch, length, heads, value_dim = values.data.shape
    blocks = values.scale.shape[3]
    scale = values.scale.transpose(0, 2, 1, 3)[:, :, None, :, :, None]
    tiles = values.data.reshape(
        batch, length // CHUNK, CHUNK, heads, blocks, value_dim // blocks
    ).astype(jnp.float32)
    return (tiles * scale).astype(dtype).reshape(values.data.shape)
