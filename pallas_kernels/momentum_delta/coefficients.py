"""Coefficients of a chunk inside a kernel (docs/algorithm.md, section 3).

Everything is a product of non-negative terms: nothing is subtracted but cumulative sums of log
gates, and nothing is divided. With the default erase key `p = alpha k` the decay up to and with the
current step is what both the error and the output need, so `decay` below includes step `t`; with
an explicit `p` it stops one step earlier, and `lift = alpha` takes it to step `t`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.lowering import Precision, dot
from pallas_kernels.momentum_delta.layout import iotas


class Decays(NamedTuple):
    """Segment products of one chunk; `t` rows, `i`, `j` columns."""

    a: jax.Array  # [C, C] decay from after step i to step t (before it, if p is explicit), i < t
    w: jax.Array  # [C, C] momentum from after step j to step t, j <= t
    total_a: jax.Array  # [C] decay from the chunk's start, over the same steps as `a`
    total_w: jax.Array  # [C] momentum from the chunk's start to step t
    lift: jax.Array | None  # [C] alpha_t if p is explicit; None means 1


class Coefficients(NamedTuple):
    """What the error (`*_read`) and the output see of the gates."""

    gamma_read: jax.Array  # [C, C]
    gamma: jax.Array  # [C, C]
    lead_read: jax.Array  # [C]
    lead: jax.Array  # [C]
    total: jax.Array  # [C] decay from the chunk's start through step t


def decays(log_alpha: jax.Array, log_mu: jax.Array, explicit_p: bool) -> Decays:
    """Segment products. Masked exponents are clipped before `exp`: all stay at most 0."""
    row, column = iotas()
    to_alpha, to_mu = jnp.cumsum(log_alpha), jnp.cumsum(log_mu)
    read_to = to_alpha - log_alpha if explicit_p else to_alpha

    def segments(to: jax.Array, start: jax.Array, mask: jax.Array) -> jax.Array:
        exponents = jnp.minimum(to[:, None] - start[None, :], 0.0)
        return jnp.where(mask, jnp.exp(exponents), 0.0)

    return Decays(
        a=segments(read_to, to_alpha, row > column),
        w=segments(to_mu, to_mu, row >= column),
        total_a=jnp.exp(jnp.minimum(read_to, 0.0)),
        total_w=jnp.exp(to_mu),
        lift=jnp.exp(log_alpha) if explicit_p else None,
    )


def coefficients(d: Decays, beta: jax.Array, precision: Precision) -> Coefficients:
    """Gamma and the lead of the momentum, from one `[C, C] x [C, C]` product."""
    a_beta = d.a * beta[None, :]
    gamma_read = dot(a_beta, d.w, precision)
    lead_read = jnp.sum(a_beta * d.total_w[None, :], axis=1)
    lifted, lead, total = gamma_read, lead_read, d.total_a
    if d.lift is not None:
        lifted, lead, total = d.lift[:, None] * gamma_read, d.lift * lead, d.lift * total
    return Coefficients(
        gamma_read=gamma_read,
        gamma=lifted + beta[:, None] * d.w,
        lead_read=lead_read,
        lead=lead + beta * d.total_w,
        total=total,
    )


def unit_lower_inverse(lower: jax.Array, precision: Precision) -> jax.Array:
    """`(I + L)^-1` for strictly lower triangular `L`, as stable as forward substitution.

    Diagonal blocks of 2, 4, ... rows are joined in pairs, `[[X1, 0], [-X2 L21 X1, X2]]`, all pairs
    in one masked product. (Powers of `L` cost the same and cancel when keys are nearly parallel.)
    """
    row, column = iotas()
    inverse = jnp.where(row == column, 1.0, 0.0)
    # blocks of one row are 1, so the first join is -L21
    inverse -= jnp.where((row // 2 == column // 2) & (row > column), lower, 0.0)
    block = 2
    while block < lower.shape[0]:
        joins = (row // (2 * block) == column // (2 * block)) & (row // block > column // block)
        corner = dot(jnp.where(joins, lower, 0.0), inverse, precision)
        inverse -= dot(inverse, corner, precision)
        block *= 2
    return inverse


def inverse_norm(x: jax.Array, normalize: bool) -> jax.Array:
    """`1 / sqrt(sum(x^2) + 1e-6)` of the rows of `[C, K]`; ones if not normalising."""
    if not normalize:
        return jnp.ones((x.shape[0],), jnp.float32)
    wide = x.astype(jnp.float32)
    return jax.lax.rsqrt(jnp.sum(wide * wide, axis=1) + 1e-6)
