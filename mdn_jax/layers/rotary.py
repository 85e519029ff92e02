"""Rotary position embedding."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "B T H D"], positions: Int[Array, "B T"], *, theta: float
) -> Float[Array, "B T H D"]:
    """Rotates the pairs `(x[i], x[i + D/2])` by `position * theta^(-2i/D)` (half-split form).

    Args:
      x: queries or keys; `D` is even.
      positions: of every token in its document, from 0.
      theta: base of the frequencies.

    Returns:
      The rotated `x` in its dtype; angles and products are float32 (float64 for float64).
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=wide) / half)
    angles = positions[:, :, None, None].astype(wide) * frequencies  # [B, T, 1, D/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(wide), x[..., half:].astype(wide)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
