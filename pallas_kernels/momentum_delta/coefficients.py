"""Coefficients of a chunk inside a kernel (docs/algorithm.md, section 3), half by half.

Everything is a product or a sum of non-negative terms: nothing is subtracted but cumulative sums of
log gates, and nothing is divided. Each half of a chunk has coefficients of its own (`Half`); what
the second half sees of the first is of rank 2 (`after`), so the chunk costs two small products.

With the default erase key `p = alpha k` the decay up to and with the current step is what both the
error and the output need, so `total` includes step `t` for both; with an explicit `p` the error's
stops one step earlier, and `lift = alpha` takes it to step `t`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import Precision, dot
from pallas_kernels.momentum_delta.layout import Leaf, iotas, lanes

LOG_ZERO = -110.0
"""Log of a gate of zero."""


class Sight(NamedTuple):
    """What step `t` sees of earlier writes and of the states entering: its row of coefficients."""

    gamma: jax.Array  # [n, m] of the write of step j
    total: jax.Array  # [n] of S
    lead: jax.Array  # [n] of N


class Ends(NamedTuple):
    """What the states at the end hold of the writes and of the states entering."""

    gamma: jax.Array  # [n] S, of the write of step j
    w: jax.Array  # [n] N, of the write of step j
    total: jax.Array  # S of S
    lead: jax.Array  # S of N
    momentum: jax.Array  # N of N


class Half(NamedTuple):
    """Coefficients of half a chunk; `t` rows, `i`, `j` columns.

    Attributes:
      a: `[n, n]` decay from after step i to step t (before it, if p is explicit), i < t.
      w: `[n, n]` momentum from after step j to step t, j <= t.
      later: `[n, n]` the part of `read.gamma` that comes through the momentum of later steps: all
        but `a beta`.
      momentum: `[n]` momentum from the half's start to step t.
      lift: `[n]` alpha_t if p is explicit; None means 1.
      read: what the error of a step sees, before its write.
      out: what its output sees, after it.
    """

    a: jax.Array
    w: jax.Array
    later: jax.Array
    momentum: jax.Array
    lift: jax.Array | None
    read: Sight
    out: Sight


def half_coefficients(
    log_alpha: jax.Array,
    log_mu: jax.Array,
    beta: jax.Array,
    explicit_p: bool,
    precision: Precision,
) -> Half:
    """Of gates `[n]`. Masked exponents are clipped before `exp`: all stay at most 0."""
    row, column = iotas(beta.shape[0])
    to_alpha, to_mu = jnp.cumsum(log_alpha), jnp.cumsum(log_mu)
    read_to = to_alpha - log_alpha if explicit_p else to_alpha

    def segments(to: jax.Array, start: jax.Array, mask: jax.Array) -> jax.Array:
        exponents = jnp.minimum(to[:, None] - start[None, :], 0.0)
        return jnp.where(mask, jnp.exp(exponents), 0.0)

    a = segments(read_to, to_alpha, row > column)
    w = segments(to_mu, to_mu, row >= column)
    momentum = jnp.exp(to_mu)
    a_beta = a * beta[None, :]
    later = dot(a_beta, jnp.where(row > column, w, 0.0), precision)
    read = Sight(
        gamma=later + a_beta,
        total=jnp.exp(jnp.minimum(read_to, 0.0)),
        lead=jnp.sum(a_beta * momentum[None, :], axis=1),
    )
    lift = jnp.exp(log_alpha) if explicit_p else None
    lifted = read
    if lift is not None:
        lifted = Sight(lift[:, None] * read.gamma, lift * read.total, lift * read.lead)
    out = Sight(
        gamma=lifted.gamma + beta[:, None] * w,
        total=lifted.total,
        lead=lifted.lead + beta * momentum,
    )
    return Half(a=a, w=w, later=later, momentum=momentum, lift=lift, read=read, out=out)


def last(steps: jax.Array) -> jax.Array:
    """The last element of `[n]`."""
    size = steps.shape[0]
    return jnp.sum(jnp.where(lanes(size) == size - 1, steps, 0.0))


def last_row(matrix: jax.Array) -> jax.Array:
    """The last row of `[n, m]`."""
    size = matrix.shape[0]
    return jnp.sum(jnp.where(iotas(size)[0] == size - 1, matrix, 0.0), axis=0)


def ends(half: Half) -> Ends:
    """The coefficients of the states at the end of a half."""
    return Ends(
        gamma=last_row(half.out.gamma),
        w=last_row(half.w),
        total=last(half.out.total),
        lead=last(half.out.lead),
        momentum=last(half.momentum),
    )


def after(total: jax.Array, lead: jax.Array, first: Ends) -> Sight:
    """What the second half, with `total` and `lead` of its own, sees of the first and before it."""
    return Sight(
        gamma=total[:, None] * first.gamma[None, :] + lead[:, None] * first.w[None, :],
        total=total * first.total,
        lead=total * first.lead + lead * first.momentum,
    )


def halves(steps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[C]` as two of `[C / 2]`."""
    first, second = jnp.split(steps, 2)
    return first, second


def lower_quarters(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The blocks `11`, `21` and `22` of `[C, C]`."""
    top, bottom = jnp.split(matrix, 2)
    left, right = jnp.split(bottom, 2, axis=1)
    return jnp.split(top, 2, axis=1)[0], left, right


def unit_lower_inverses(lowers: Sequence[jax.Array], precision: Precision) -> tuple[jax.Array, ...]:
    """`(I + L)^-1` for strictly lower triangular `L`, as stable as forward substitution.

    Diagonal blocks of 2, 4, ... rows are joined in pairs, `[[X1, 0], [-X2 L21 X1, X2]]`, all pairs
    in one masked product. (Powers of `L` cost the same and cancel when keys are nearly parallel.)
    Several matrices go side by side, for each waits for its own products.
    """
    size = lowers[0].shape[0]
    row, column = iotas(size)
    eye = jnp.where(row == column, 1.0, 0.0)
    # blocks of one row are 1, so the first join is -L21
    pairs = (row // 2 == column // 2) & (row > column)

    def join(level: jax.Array, inverses: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        joined = (row >> (level + 1)) == (column >> (level + 1))
        corners = [
            dot(jnp.where(joined & ((row >> level) > (column >> level)), lower, 0.0), x, precision)
            for lower, x in zip(lowers, inverses, strict=True)
        ]
        return tuple(
            x - dot(x, corner, precision) for x, corner in zip(inverses, corners, strict=True)
        )

    # a loop, for code that is run once waits for its instructions
    inverses = tuple(eye - jnp.where(pairs, lower, 0.0) for lower in lowers)
    return lax.fori_loop(1, size.bit_length() - 1, join, inverses)


def log_gate(ref: Leaf, at: pl.Slice) -> jax.Array:
    """Log gates as the coefficients take them: bounded below, as they are sums' differences.

    The bound's `exp` is zero in float32; it is small enough in size for sums to stay precise.
    """
    return jnp.maximum(ref[at], LOG_ZERO)


def inverse_norm(x: jax.Array, normalize: bool) -> jax.Array:
    """`1 / sqrt(sum(x^2) + 1e-6)` of the rows of `[n, K]`; ones if not normalising."""
    if not normalize:
        return jnp.ones((x.shape[0],), jnp.float32)
    wide = x.astype(jnp.float32)
    return jax.lax.rsqrt(jnp.sum(wide * wide, axis=1) + 1e-6)
