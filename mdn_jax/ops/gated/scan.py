"""The definition of the gated rules: one step after another with `lax.scan`, the oracle of tests.

It shares no formula with the chunk algorithm; every product is taken at the full precision of its
dtype on every device.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mdn_jax.ops.gated.inputs import GatedInputs
from mdn_jax.ops.inputs import pad_time, split_time

_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def scan_gated(
    inputs: GatedInputs,
    state: Float[Array, "B H G K V"],
    *,
    delta: bool,
    scale: float,
    chunk_size: int | None,
) -> tuple[Array, Array]:
    """Runs the recurrence step by step, checkpointed in pieces of `chunk_size` steps.

    Args:
      inputs: prepared inputs, in the dtype to compute in.
      state: entering state.
      delta: write the value minus what the memory holds for the key, not the value itself.
      scale: factor on the output.
      chunk_size: steps between two kept states; None means `ceil(sqrt(T))`.

    Returns:
      Outputs `[B, T, H, G, V]` and the final state.
    """
    length = inputs.v.shape[1]
    piece = min(chunk_size or math.isqrt(length - 1) + 1, length)
    pieces = split_time(pad_time(inputs, -length % piece), piece)
    by_channel = inputs.by_channel

    def step(s: Array, x: GatedInputs) -> tuple[Array, Array]:
        s = jnp.where(x.starts[:, None, None, None, None], 0, s)  # [B, H, G, K, V]
        alpha = jnp.exp(x.log_alpha)
        alpha = alpha if by_channel else alpha[..., None]  # [B, H, G, K or 1]
        write = x.v
        if delta:
            p = alpha * (x.k[:, :, None] if x.erase is None else x.erase) if x.p is None else x.p
            write = x.v - _einsum("bhgkv,bhgk->bhgv", s, jnp.broadcast_to(p, s.shape[:-1]))
        s = alpha[..., None] * s + _einsum("bhk,bhgv->bhgkv", x.k, x.beta[..., None] * write)
        return s, scale * _einsum("bhgkv,bhk->bhgv", s, x.q)

    def run(state: Array, piece: GatedInputs) -> tuple[Array, Array]:
        return lax.scan(step, state, piece)

    time_first = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), pieces)  # [NT, C, B, ...]
    state, o = lax.scan(jax.checkpoint(run, prevent_cse=False), state, time_first)
    return jnp.moveaxis(o.reshape(-1, *o.shape[2:]), 0, 1)[:, :length], state
