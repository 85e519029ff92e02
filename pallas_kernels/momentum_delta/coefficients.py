"""Coefficients of a chunk inside a kernel (docs/algorithm.md, section 3), half by half.

Everything is a product or a sum of non-negative terms: nothing is subtracted but cumulative sums of
log gates, and nothing is divided. Each half of a chunk has coefficients of its own (`Half`); what
the second half sees of the first is of rank 2 (`across_halves`), so the chunk costs two small
products.

With the default erase key `p = alpha k` the decay up to and with the current step is what both the
read before the write and the output need, so `decay` includes step `t` for both; with an explicit
`p` that of the read stops one step earlier, and `lift = alpha` takes it to step `t`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import Precision, dot
from pallas_kernels.momentum_delta.types import CHUNK, Leaf

LOG_ZERO = -110.0
"""Log of a gate of zero."""
LOG2_E = math.log2(math.e)
_FLOAT16_MAX = 65_504.0


class Coefficients(NamedTuple):
    """What step `t` sees of earlier writes and of the states entering."""

    gamma: jax.Array  # [n, m] of the write of step j
    decay: jax.Array  # [n] of S
    lead: jax.Array  # [n] of N


class HalfEnd(NamedTuple):
    """What the states at the end of a half hold of its writes and of the states entering."""

    gamma: jax.Array  # [n] S, of the write of step j
    carry: jax.Array  # [n] N, of the write of step j
    decay: jax.Array  # S of S
    lead: jax.Array  # S of N
    momentum: jax.Array  # N of N


class Quarters(NamedTuple):
    """The blocks 11, 21 and 22 of a lower triangular `[C, C]`."""

    first: jax.Array
    corner: jax.Array
    second: jax.Array


class Half(NamedTuple):
    """Coefficients of half a chunk; `t` rows, `i`, `j` columns.

    Attributes:
      segment_decay: `[n, n]` decay from after step i to step t, i < t (before t, if p is explicit).
      carry: `[n, n]` momentum from after step j to step t, j <= t.
      gamma_carried: `[n, n]` the part of `before.gamma` that comes through the momentum of later
        steps: all but `segment_decay * beta`.
      momentum: `[n]` momentum from the half's start to step t.
      carry_last: `[n]` the last row of `carry`.
      momentum_last: the last of `momentum`, a scalar.
      lift: `[n]` alpha_t if p is explicit; None means 1.
      before: what a step reads, before its write (`gamma_before`, ... in docs/algorithm.md).
      after: what its output sees, after it.
    """

    segment_decay: jax.Array
    carry: jax.Array
    gamma_carried: jax.Array
    momentum: jax.Array
    carry_last: jax.Array
    momentum_last: jax.Array
    lift: jax.Array | None
    before: Coefficients
    after: Coefficients


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
        return jnp.where(mask, exp(exponents), 0.0)

    segment_decay = segments(read_to, to_alpha, row > column)
    carry = segments(to_mu, to_mu, row >= column)
    momentum = exp(to_mu)
    a_beta = segment_decay * beta[None, :]
    gamma_carried = dot(a_beta, jnp.where(row > column, carry, 0.0), precision)
    before = Coefficients(
        gamma=gamma_carried + a_beta,
        decay=exp(jnp.where(read_to > 0.0, 0.0, read_to)),  # nan stays nan
        lead=jnp.sum(a_beta * momentum[None, :], axis=1),
    )
    lift = exp(log_alpha) if explicit_p else None
    lifted = before
    if lift is not None:
        lifted = Coefficients(lift[:, None] * before.gamma, lift * before.decay, lift * before.lead)
    after_write = Coefficients(
        gamma=lifted.gamma + beta[:, None] * carry,
        decay=lifted.decay,
        lead=lifted.lead + beta * momentum,
    )
    all_mu = last(to_mu)
    return Half(
        segment_decay=segment_decay,
        carry=carry,
        gamma_carried=gamma_carried,
        momentum=momentum,
        carry_last=exp(jnp.minimum(all_mu - to_mu, 0.0)),
        momentum_last=exp(all_mu),
        lift=lift,
        before=before,
        after=after_write,
    )


def iotas(size: int = CHUNK) -> tuple[jax.Array, jax.Array]:
    """Row and column numbers of a `[size, size]` matrix."""
    shape = (size, size)
    return lax.broadcasted_iota("int32", shape, 0), lax.broadcasted_iota("int32", shape, 1)


def lanes(size: int = CHUNK) -> jax.Array:
    """`0 .. size - 1`."""
    return lax.broadcasted_iota("int32", (size,), 0)


def last(steps: jax.Array) -> jax.Array:
    """The last element of `[n]`."""
    size = steps.shape[0]
    return jnp.sum(jnp.where(lanes(size) == size - 1, steps, 0.0))


def last_row(matrix: jax.Array) -> jax.Array:
    """The last row of `[n, m]`."""
    size = matrix.shape[0]
    return jnp.sum(jnp.where(iotas(size)[0] == size - 1, matrix, 0.0), axis=0)


def half_end(half: Half) -> HalfEnd:
    """The coefficients of the states at the end of a half."""
    return HalfEnd(
        gamma=last_row(half.after.gamma),
        carry=half.carry_last,
        decay=last(half.after.decay),
        lead=last(half.after.lead),
        momentum=half.momentum_last,
    )


def across_halves(decay: jax.Array, lead: jax.Array, first: HalfEnd) -> Coefficients:
    """What the second half, with `decay` and `lead` of its own, sees of the first and before it."""
    return Coefficients(
        gamma=decay[:, None] * first.gamma[None, :] + lead[:, None] * first.carry[None, :],
        decay=decay * first.decay,
        lead=decay * first.lead + lead * first.momentum,
    )


def halves(steps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[C]` as two of `[C / 2]`."""
    first, second = jnp.split(steps, 2)
    return first, second


def lower_quarters(matrix: jax.Array) -> Quarters:
    """Those of `[C, C]`."""
    top, bottom = jnp.split(matrix, 2)
    return Quarters(jnp.split(top, 2, axis=1)[0], *jnp.split(bottom, 2, axis=1))


def unit_lower_inverse(lower: Quarters, precision: Precision, *, float16: bool) -> Quarters:
    """`(I + L)^-1` for strictly lower triangular `L`, as stable as forward substitution.

    Diagonal blocks of 2, 4, ... rows are joined in pairs, `[[X1, 0], [-X2 L21 X1, X2]]`, all pairs
    in one masked product. (Powers of `L` cost the same and cancel when keys are nearly parallel.)
    The two halves go side by side, for each waits for its own products.

    Args:
      lower: `L`.
      precision: of the products.
      float16: multiply in float16, which has the digits of TF32 at half its cost, where everything
        fits into its range.
    """
    if not float16:
        return _unit_lower_inverse(lower, lambda a, b: dot(a, b, precision))

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return dot(a.astype(jnp.float16), b.astype(jnp.float16), None)

    fast = _unit_lower_inverse(lower, product)
    # what leaves the range on the way is infinite or nan in the end
    sizes = [jnp.sum(jnp.abs(x)) for x in fast]
    return lax.cond(
        sizes[0] + sizes[1] + sizes[2] < _FLOAT16_MAX,
        lambda: fast,
        lambda: _unit_lower_inverse(lower, lambda a, b: dot(a, b, precision)),
    )


def _unit_lower_inverse(
    lower: Quarters, product: Callable[[jax.Array, jax.Array], jax.Array]
) -> Quarters:
    halves = (lower.first, lower.second)
    size = lower.first.shape[0]
    row, column = iotas(size)
    apart = row ^ column  # its highest bit: the level at which the two are joined

    def join(level: jax.Array, inverses: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        corners = [
            product(jnp.where((apart >> level) == 1, half, 0.0), x)
            for half, x in zip(halves, inverses, strict=True)
        ]
        return tuple(x - product(x, c) for x, c in zip(inverses, corners, strict=True))

    # blocks of one row are 1, so the first join is -L21
    eye = jnp.where(apart == 0, 1.0, 0.0)
    inverses = tuple(eye - jnp.where(apart == 1, half, 0.0) for half in halves)
    # a loop, for code that is run once waits for its instructions
    first, second = lax.fori_loop(1, size.bit_length() - 1, join, inverses)
    return Quarters(first, -product(second, product(lower.corner, first)), second)


def log_gate(ref: Leaf, at: pl.Slice) -> jax.Array:
    """Log gates as the coefficients take them: bounded below, as they are sums' differences.

    The bound's `exp` is zero in float32; it is small enough in size for sums to stay precise. nan
    stays nan (in a maximum on a GPU it would not).
    """
    log = ref[at]
    return jnp.where(log < LOG_ZERO, LOG_ZERO, log)


def exp(x: jax.Array) -> jax.Array:
    """`e^x` of `x <= 0`, as a power of 2: two instructions, not ten.

    Rounding the product costs at most a relative `6e-8 |x|`, where the result is `e^-|x|`.
    """
    return jnp.exp2(x * LOG2_E)


def squares(x: jax.Array) -> jax.Array:
    """`sum(x^2)` of the rows of `[n, K]`, float32."""
    wide = x.astype(jnp.float32)
    return jnp.sum(wide * wide, axis=1)


def diagonal(matrix: jax.Array) -> jax.Array:
    """Of `[n, n]`."""
    row, column = iotas(matrix.shape[0])
    return jnp.sum(jnp.where(row == column, matrix, 0.0), axis=1)


def inverse_norm(square: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """`1 / sqrt(sum(x^2) + epsilon)`; nan, not zero, where the sum is too large for float32."""
    return lax.rsqrt(square + 0.0 * square + epsilon)
