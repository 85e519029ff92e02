"""The definition: one step of the recurrence after another with `lax.scan`.

This file is the oracle of every test in the project and of other people's kernels. It shares no
formula with the chunk algorithm: it reads like the recurrence of the paper, and every product is
taken at the full precision of its dtype on every device.
"""

import math
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from mdn_jax.ops.inputs import RuleInputs, pad_time, split_time
from mdn_jax.ops.state import MDNState

_PIECE = 64  # steps, of a length that is not known yet

_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def scan_rule(
    inputs: RuleInputs, state: MDNState, *, scale: float | Array, chunk_size: int | None
) -> tuple[Array, MDNState]:
    """Runs the recurrence step by step.

    The scan is checkpointed in pieces, so that its gradient keeps one state a piece instead of one
    a step: with pieces of `sqrt(T)` steps the memory is `O(sqrt(T) K V)` a head.

    Args:
      inputs: prepared inputs (see `RuleInputs`), in the dtype to compute in.
      state: entering state.
      scale: factor on the output.
      chunk_size: steps between two kept states; None means `ceil(sqrt(T))`, of a symbolic `T` 64.

    Returns:
      Outputs `[B, T, H, G, V]` and the final state.
    """
    batch, length, heads, groups, value_dim = inputs.v.shape
    key_dim = inputs.k.shape[-1]
    if jax.export.is_symbolic_dim(length):
        piece = chunk_size or _PIECE
    else:
        piece = min(chunk_size or math.isqrt(length - 1) + 1, length)
    padded = (length + piece - 1) // piece * piece
    pieces = split_time(pad_time(inputs, padded - length), piece)

    def step(state: tuple[Array, Array], x: RuleInputs) -> tuple[tuple[Array, Array], Array]:
        s, m = state  # [B, H, G, K, V]
        fresh = x.starts[:, None, None, None, None]
        s, m = jnp.where(fresh, 0, s), jnp.where(fresh, 0, m)
        alpha, mu = jnp.exp(x.log_alpha)[..., None], jnp.exp(x.log_mu)[..., None]
        p = alpha * x.k[:, :, None] if x.p is None else x.p  # [B, H, G, K]
        w = _einsum("bhgkv,bhgk->bhgv", s, jnp.broadcast_to(p, s.shape[:-1])) - x.v
        write = _einsum("bhk,bhgv->bhgkv", x.k, x.eta[..., None] * w)
        m = mu[..., None] * m + write
        s = alpha[..., None] * s - x.beta[..., None, None] * m
        return (s, m), scale * _einsum("bhgkv,bhk->bhgv", s, x.q)

    def run(state: tuple[Array, Array], piece: RuleInputs) -> tuple[tuple[Array, Array], Array]:
        return lax.scan(step, state, piece)

    grouped = (batch, heads, groups, key_dim, value_dim)
    carry = (state.s.reshape(grouped), state.m.reshape(grouped))
    time_first = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), pieces)  # [NT, C, B, ...]
    (s, m), o = lax.scan(jax.checkpoint(run, prevent_cse=False), carry, time_first)
    o = jnp.moveaxis(o.reshape(-1, *o.shape[2:]), 0, 1)[:, :length]
    return o, MDNState(s=s.reshape(state.s.shape), m=m.reshape(state.m.shape))
