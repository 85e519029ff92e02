"""States as they are kept between decoding steps: float32, bfloat16, or float16 with scales.

The scales are one a column of V for each state: a program of the decode kernels has all K rows of
its columns, so that a scale depends on no tile. They are powers of two, found when a state is
written.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.momentum_delta.block_scaling import FLOAT16, scale_for
from pallas_kernels.momentum_delta.types import Memory


def shapes_of[T](arrays: T) -> T:
    """Of what is written in the place of what came."""
    shapes: T = jax.tree.map(lambda y: jax.ShapeDtypeStruct(y.shape, y.dtype), arrays)
    return shapes


def load_states(ref: Memory) -> tuple[jax.Array, jax.Array]:
    """Memory and momentum `[K, block]` in float32, from references to a block of each."""
    s, m = ref.s[...].astype(jnp.float32), ref.m[...].astype(jnp.float32)
    if ref.scale is None:
        return s, m
    return s * ref.scale[0, :][None, :], m * ref.scale[1, :][None, :]


def store_states(ref: Memory, s: jax.Array, m: jax.Array) -> None:
    """Writes both as they are kept, over all K rows of the block's columns."""
    if ref.scale is None:
        ref.s[...], ref.m[...] = s.astype(ref.s.dtype), m.astype(ref.m.dtype)
        return
    for row, (tile, state) in enumerate(((ref.s, s), (ref.m, m))):
        scale = scale_for(jnp.max(jnp.abs(state), axis=0))
        tile[...] = (state * scale.inverse[None, :]).astype(FLOAT16)
        ref.scale[row, :] = scale.size
