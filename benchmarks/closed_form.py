"""The published closed form of a chunk's coefficients, to compare with; nothing else uses it.

    gamma_tj = exp(A_t + log c_t - M_j) (1 - c_(j-1) / c_t)        c_t = sum_(i<=t) beta_i m_i / a_i

with cumulative sums `A, M` of log alpha and log mu, `a = exp(A)`, `m = exp(M)`, and `c` kept in log
space (MDN, arXiv 2605.05838). It divides by `a` and subtracts: docs/algorithm.md, section 3.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mdn_jax import MDNState
from mdn_jax.ops.coefficients import ChunkCoefficients, chunk_coefficients
from mdn_jax.ops.inputs import l2_normalize

# (log_alpha, log_mu, beta), each [..., C] -> coefficients
Coefficients = Callable[[Array, Array, Array], ChunkCoefficients]

_BETA_EPSILON = 1e-6  # published, so that log beta is finite


def closed_form(
    log_alpha: Float[Array, "*h C"], log_mu: Float[Array, "*h C"], beta: Float[Array, "*h C"]
) -> ChunkCoefficients:
    """Coefficients of a chunk by the published formula, in the dtype of the gates."""
    a, m = jnp.cumsum(log_alpha, axis=-1), jnp.cumsum(log_mu, axis=-1)
    log_c = _log_of_sums(jnp.log(beta + _BETA_EPSILON) + m - a)
    before = _shifted(log_c, -jnp.inf)
    index = jnp.arange(beta.shape[-1])
    lower = index[:, None] >= index[None, :]
    ratio = jnp.exp(jnp.where(lower, before[..., None, :] - log_c[..., :, None], 0.0))
    gamma = jnp.exp((a + log_c)[..., :, None] - m[..., None, :]) * (1.0 - ratio)
    gamma = jnp.where(lower, gamma, 0.0)
    decay, lead = jnp.exp(a), jnp.exp(a + log_c)
    return ChunkCoefficients(
        gamma=gamma,
        gamma_before=jnp.pad(gamma, [(0, 0)] * (gamma.ndim - 2) + [(1, 0), (0, 0)])[..., :-1, :],
        decay=decay,
        decay_before=_shifted(decay, 1.0),
        lead=lead,
        lead_before=_shifted(lead, 0.0),
        momentum_last=jnp.exp(m[..., -1]),
        carry_last=jnp.exp(m[..., -1:] - m),
    )


def without_cancellation(
    log_alpha: Float[Array, "*h C"], log_mu: Float[Array, "*h C"], beta: Float[Array, "*h C"]
) -> ChunkCoefficients:
    """Coefficients of a chunk as the library computes them."""
    return chunk_coefficients(log_alpha, log_mu, beta, jnp.zeros(beta.shape, bool))


def _log_of_sums(logs: Float[Array, "*h C"]) -> Float[Array, "*h C"]:
    """Log of the sum of the numbers so far, one after another as a kernel adds them."""

    def add(total: Array, log: Array) -> tuple[Array, Array]:
        total = jnp.logaddexp(total, log)
        return total, total

    none = jnp.full(logs.shape[:-1], -jnp.inf, logs.dtype)
    _, sums = lax.scan(add, none, jnp.moveaxis(logs, -1, 0))
    return jnp.moveaxis(sums, 0, -1)


def _shifted(x: Array, first: float) -> Array:
    pad = [(0, 0)] * (x.ndim - 1) + [(1, 0)]
    return jnp.pad(x, pad, constant_values=first)[..., :-1]


def chunk_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_alpha: Float[Array, "B T H"],
    log_mu: Float[Array, "B T H"],
    beta: Float[Array, "B T H"],
    eta: Float[Array, "B T H"],
    *,
    initial_state: MDNState,
    coefficients: Coefficients,
    chunk: int,
) -> tuple[Float[Array, "B T H V"], MDNState]:
    """The chunk algorithm (docs/algorithm.md, section 2), one chunk after another.

    Computes in the dtype of the states with full precision, whatever that of `q, k, v`; `T` is a
    multiple of `chunk`.
    """
    wide = initial_state.s.dtype
    matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    q, k = (l2_normalize(x.astype(wide)) for x in (q, k))
    arrays = (q * k.shape[-1] ** -0.5, k, v.astype(wide), log_alpha, log_mu, beta, eta)

    def cut(x: Array) -> Array:  # [B, T, H, ...] -> [NT, B, H, C, ...]
        x = jnp.moveaxis(x, 2, 1)
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:]), 2, 0)

    def step(state: tuple[Array, Array], x: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        s, n = state  # n = -m
        q, k, v, log_alpha, log_mu, beta, eta = x
        co = coefficients(log_alpha, log_mu, beta)
        keys = jnp.swapaxes(k, -1, -2)
        p = jnp.exp(log_alpha)[..., None] * k
        lower = matmul(p, keys) * co.gamma_before * eta[..., None, :]
        read = co.decay_before[..., None] * matmul(p, s) + co.lead_before[..., None] * matmul(p, n)
        unit = jnp.broadcast_to(jnp.eye(chunk, dtype=wide), lower.shape)
        v_new = lax.linalg.triangular_solve(
            unit + lower, v - read, left_side=True, lower=True, unit_diagonal=True
        )
        attention = matmul(q, keys) * co.gamma * eta[..., None, :]
        o = co.decay[..., None] * matmul(q, s) + co.lead[..., None] * matmul(q, n)
        o = o + matmul(attention, v_new)
        last = jnp.stack([co.gamma[..., -1, :], co.carry_last], axis=-1) * eta[..., None]
        write_s, write_n = (matmul(keys, last[..., i : i + 1] * v_new) for i in (0, 1))
        decay, lead, momentum = (
            y[..., None, None] for y in (co.decay[..., -1], co.lead[..., -1], co.momentum_last)
        )
        return (decay * s + lead * n + write_s, momentum * n + write_n), o

    (s, n), o = lax.scan(step, (initial_state.s, -initial_state.m), tuple(map(cut, arrays)))
    o = jnp.moveaxis(o, 0, 2)  # [B, H, NT, C, V]
    o = jnp.moveaxis(o.reshape(*o.shape[:2], -1, o.shape[-1]), 1, 2)
    return o.astype(v.dtype), MDNState(s=s, m=-n)
