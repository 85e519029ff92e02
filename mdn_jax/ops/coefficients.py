"""Coefficients of one chunk, from the gates, without any subtraction or division.

The published form divides cumulative products, `exp(A_t - M_j) (1 - c_(j-1) / c_t)`: it cancels,
and overflows, in ordinary gate ranges. Here every exponent is a sum of non-positive terms over the
steps of one segment, and every coefficient a sum of non-negative products: the relative error stays
near machine precision whatever the gates, and zeros (a document's start, alpha = 0) stay exact.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

# A log-gate below this is a gate of exactly zero; finite, so that -inf never meets a zero.
LOG_ZERO = -1e4


class ChunkCoefficients(NamedTuple):
    """What the chunk algorithm needs of the gates; local time `1..C`, `t` rows, `j` columns.

    The names are those of the table at the head of docs/algorithm.md. With `N = -M` and
    `v'_j = v_j - S_(j-1)^T p_j` (`v_new` in the code):

        S_t = decay_t S_0 + lead_t N_0 + sum_j gamma_tj eta_j k_j v'_j^T
        N_t = momentum_t N_0           + sum_j carry_tj eta_j k_j v'_j^T

    and `*_before` is the same coefficient one step earlier (what step `t` sees before it writes).
    """

    gamma: Float[Array, "*h C C"]  # lower triangular
    gamma_before: Float[Array, "*h C C"]  # strictly lower triangular
    decay: Float[Array, "*h C"]
    decay_before: Float[Array, "*h C"]
    lead: Float[Array, "*h C"]
    lead_before: Float[Array, "*h C"]
    momentum_last: Float[Array, "*h"]  # momentum_C
    carry_last: Float[Array, "*h C"]  # row C of carry


@jax.custom_vjp
def segment_sums(steps: Float[Array, "*h C"], to: Bool[Array, "C C"]) -> Float[Array, "*h C C"]:
    """`D[t, i] = sum of steps s with i < s and to[t, s]`.

    One product with masks: terms of one sign, never the difference of two cumulative sums. Its
    gradient is of sums that hold no other step's: what is not finite in one document stays there.
    """
    index = jnp.arange(steps.shape[-1])
    after = (index[:, None] > index[None, :]).astype(steps.dtype)  # [s, i]
    return jnp.einsum("...ts,si->...ti", steps[..., None, :] * to, after, precision="highest")


def _segment_sums_forward(steps: Array, to: Array) -> tuple[Array, Array]:
    return segment_sums(steps, to), to


def _segment_sums_backward(to: Array, d_sums: Array) -> tuple[Array, None]:
    margin = [(0, 0)] * (d_sums.ndim - 1) + [(1, 0)]
    before = jnp.pad(jnp.cumsum(d_sums[..., :-1], axis=-1), margin)  # [t, s], of the i before s
    return jnp.sum(jnp.where(to, before, 0), axis=-2), None


segment_sums.defvjp(_segment_sums_forward, _segment_sums_backward)


def chunk_coefficients(
    log_alpha: Float[Array, "*h C"],
    log_mu: Float[Array, "*h C"],
    beta: Float[Array, "*h C"],
    starts: Bool[Array, "*#h C"],
) -> ChunkCoefficients:
    """Coefficients of a chunk (math: section 3 and 4 of docs/algorithm.md).

    Args:
      log_alpha: log of the decay, at most 0.
      log_mu: log of the momentum, at most 0.
      beta: step size, at least 0.
      starts: True at the first step of a document; nothing of the steps before is seen from there.

    Returns:
      The coefficients, in the dtype of the gates.
    """
    log_alpha = jnp.maximum(log_alpha, LOG_ZERO)
    log_mu = jnp.maximum(log_mu, LOG_ZERO)
    index = jnp.arange(log_alpha.shape[-1])
    row, column = index[:, None], index[None, :]
    document = jnp.cumsum(starts, axis=-1)
    same = document[..., :, None] == document[..., None, :]
    first = document == 0  # the document that the entering states belong to

    # segment_decay_ti: from after step i to before step t; carry_ij: momentum from after step j to
    # step i. Both are selected, not multiplied by the mask: what is not finite in one document's
    # gradient would be nan in another's
    segment_decay = jnp.exp(segment_sums(log_alpha, column < row))
    a_beta = jnp.where(same & (column < row), segment_decay * beta[..., None, :], 0)
    carry = jnp.where(same & (column <= row), jnp.exp(segment_sums(log_mu, column <= row)), 0)
    alpha = jnp.exp(log_alpha)

    gamma_before = jnp.einsum("...ti,...ij->...tj", a_beta, carry, precision=lax.Precision.HIGHEST)
    gamma = alpha[..., None] * gamma_before + beta[..., None] * carry

    total_alpha, total_mu = jnp.cumsum(log_alpha, axis=-1), jnp.cumsum(log_mu, axis=-1)
    momentum = jnp.where(first, jnp.exp(total_mu), 0)
    before = jnp.pad(total_alpha[..., :-1], [(0, 0)] * (log_alpha.ndim - 1) + [(1, 0)])
    lead_before = jnp.einsum("...ti,...i->...t", a_beta, momentum, precision=lax.Precision.HIGHEST)
    return ChunkCoefficients(
        gamma=gamma,
        gamma_before=gamma_before,
        decay=jnp.where(first, jnp.exp(total_alpha), 0),
        decay_before=jnp.where(first, jnp.exp(before), 0),
        lead=alpha * lead_before + beta * momentum,
        lead_before=lead_before,
        momentum_last=momentum[..., -1],
        carry_last=carry[..., -1, :],
    )
