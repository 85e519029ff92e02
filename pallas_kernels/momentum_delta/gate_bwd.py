"""Gradients of the gates, from those of the coefficients, half a chunk at a time.

Computes d log_alpha, d log_mu, d beta and d eta (docs/algorithm.md, section 5, "Gates"): of the
paths that cross the boundary between steps u and u + 1, as products of what arrives at u and what
goes on from there. Coefficients of a half: coefficients.py.

    inputs   gates [B, T, HV] float32; attention, overlap: gradients of the [C, C] coefficients
             (intra_chunk_bwd.py); rows: gradients of row factors and scalars (inter_chunk_bwd.py);
             factors
    outputs  a gradient for each gate, [B, T, HV] float32
    grid     flat, 2 halves x HV x NT x B: half a chunk a program

Why so: what the second half sees of the first is of rank 2, so each half's gradients are its own
square and a few vectors from the other (`_of_first_half`, `_of_second_half`). One code serves both
halves: two would not fit into the instruction cache together.

Constraints: one warp for 16-bit inputs; `[32, 32]` matrices in registers.

Run it alone: `python -m benchmarks stages --stages gate_bwd`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import Precision, dot, kernel_call
from pallas_kernels.momentum_delta.block_specs import ChunkSpecs
from pallas_kernels.momentum_delta.coefficients import (
    Coefficients,
    Half,
    exp,
    half_coefficients,
    iotas,
    lanes,
    log_gate,
)
from pallas_kernels.momentum_delta.intra_chunk_bwd import IntraChunkGradients
from pallas_kernels.momentum_delta.isolation import times
from pallas_kernels.momentum_delta.rows import GRADIENT_ROWS, ChunkScalar, FactorRow
from pallas_kernels.momentum_delta.types import (
    CHUNK,
    HALF,
    HALVES,
    IntraChunk,
    Leaf,
    Options,
    Tokens,
)


class GateGradients(NamedTuple):
    """Gradients of the gates, `[B, T, HV]` float32."""

    log_alpha: Leaf
    log_mu: Leaf
    beta: Leaf
    eta: Leaf


def gate_bwd(
    x: Tokens, intra: IntraChunk, rows: jax.Array, scores: IntraChunkGradients, options: Options
) -> GateGradients:
    """Gradients of the gates.

    Args:
      x: the call's tokens.
      intra: from the forward pass.
      rows: gradients of the row factors, `InterChunkGradients.rows`.
      scores: from `intra_chunk_bwd`.
      options: of the call.
    """
    z = x.sizes
    specs = ChunkSpecs(z, len(HALVES))
    gate, matrix = specs.gate(), specs.matrix()
    blocks = rows.shape[3]
    return kernel_call(
        partial(
            _gate_bwd,
            half_of=specs.block,
            blocks=blocks,
            explicit_p=x.p is not None,
            precision=options.numerics.coefficients,
        ),
        x._replace(q=None, k=None, v=None, p=None),
        (scores.attention, scores.overlap),
        scores.scale,
        rows,
        intra.factors,
        name="mdn_gate_bwd",
        grid=specs.grid,
        in_specs=[
            Tokens(None, None, None, None, gate, gate, gate, gate),
            (matrix, matrix),
            specs.scales(scores.scale),
            specs.array(blocks, GRADIENT_ROWS, CHUNK),
            specs.factors(),
        ],
        out_specs=GateGradients(gate, gate, gate, gate),
        out_shape=GateGradients(z.gate, z.gate, z.gate, z.gate),
        warps=options.tiles.gate_bwd_warps,
        stages=1,
        interpret=options.interpret,
    )


class _FromKernels(NamedTuple):
    """What the kernels before this one found for a chunk, by reference, and how it is read.

    Attributes:
      rows: gradients of the row factors and chunk scalars, `[blocks of K, GRADIENT_ROWS, C]`.
      factors: `[13, C]`, from the forward pass.
      attention: gradient of `gamma eta` in the output, `[C, C]`.
      overlap: gradient of `gamma_before eta` in what a step reads, same shape.
      scale: block scales of both; None: 1.
      blocks: of K.
      explicit_p: with an erase key of its own.
    """

    rows: Leaf
    factors: Leaf
    attention: Leaf
    overlap: Leaf
    scale: Leaf | None
    blocks: int
    explicit_p: bool

    def _summed(self, row: FactorRow, part: Leaf) -> jax.Array:
        parts = [self.rows[i, row, part] for i in range(self.blocks)]
        return sum(parts[1:], parts[0])

    def of_key(self, row: FactorRow, part: Leaf) -> jax.Array:
        """Gradient of a row of factors of K, through the norm of k."""
        return self.factors[FactorRow.NORM_K, part] * self._summed(row, part)

    def of_query(self, row: FactorRow, part: Leaf) -> jax.Array:
        """The same of Q."""
        return self.factors[FactorRow.NORM_Q, part] * self._summed(row, part)

    def of_erase(self, row: FactorRow, part: Leaf) -> jax.Array:
        """The same of P, which has no norm if it is explicit."""
        return self._summed(row, part) if self.explicit_p else self.of_key(row, part)

    def of_scores(self, row: Leaf, column: Leaf) -> tuple[jax.Array, jax.Array]:
        """Gradients of a tile of `gamma eta` and `gamma_before eta`, float32."""
        attention, overlap = (
            x[row, column].astype(jnp.float32) for x in (self.attention, self.overlap)
        )
        if self.scale is None:
            return attention, overlap
        return attention * self.scale[0], overlap * self.scale[1]

    def scalar(self, place: ChunkScalar) -> jax.Array:
        """A scalar of the chunk."""
        return self.factors[FactorRow.SCALARS, place]

    def of_scalar(self, place: ChunkScalar) -> jax.Array:
        """Its gradient."""
        parts = [self.rows[i, FactorRow.SCALARS, place] for i in range(self.blocks)]
        return sum(parts[1:], parts[0])


class _HalfGradients(NamedTuple):
    """What reaches the coefficients of half a chunk from outside of its own square.

    Attributes:
      gamma: `[n]` gradient of the last row of `after.gamma`.
      carry: `[n]` gradient of the last row of `carry`.
      decay_before: `[n]` gradient of `before.decay`.
      lead_before: `[n]` of `before.lead`.
      decay: `[n]` of `after.decay`.
      lead: `[n]` of `after.lead`.
      momentum: of the momentum at the end, a scalar.
    """

    gamma: jax.Array
    carry: jax.Array
    decay_before: jax.Array
    lead_before: jax.Array
    decay: jax.Array
    lead: jax.Array
    momentum: jax.Array


def _gate_bwd(x, scores, scale, rows, factors, out, *, half_of, blocks, explicit_p, precision):
    # one code for both halves: two would not fit into the instruction cache together
    index = half_of(pl.program_id(0))
    at = pl.ds(index * HALF, HALF)
    lane, is_last = lanes(HALF), iotas(HALF)[0] == HALF - 1
    given = _FromKernels(rows, factors, *scores, scale, blocks, explicit_p)
    d = lax.cond(
        index == 0,
        lambda: _of_first_half(given, x, lane, is_last),
        lambda: _of_second_half(given, x.eta, lane, is_last),
    )
    eta = x.eta[at]
    log_alpha, log_mu = log_gate(x.log_alpha, at), log_gate(x.log_mu, at)
    half = half_coefficients(log_alpha, log_mu, x.beta[at], explicit_p, precision)
    d_after, d_before = given.of_scores(at, at)
    d_after += _in_last_row(d.gamma, is_last)
    d_eta = d_after * half.after.gamma + d_before * half.before.gamma
    out.eta[at] = jnp.sum(d_eta, axis=0) + d.carry * half.carry_last
    d_log_alpha, d_log_mu, d_beta = _through_coefficients(
        half,
        x.beta[at],
        d_after=Coefficients(d_after * eta[None, :], d.decay, d.lead),
        d_before=Coefficients(d_before * eta[None, :], d.decay_before, d.lead_before),
        d_carry=eta * d.carry,
        d_momentum=d.momentum,
        precision=precision,
    )
    following = index * HALF + lax.rem(lane + 1, HALF)
    out.beta[at] = d_beta
    out.log_alpha[following], out.log_mu[following] = d_log_alpha, d_log_mu


def _at_last(value: jax.Array, lane: jax.Array) -> jax.Array:
    """`[n]`, zero but for the last element."""
    return jnp.where(lane == HALF - 1, value, 0.0)


def _in_last_row(values: jax.Array, is_last: jax.Array) -> jax.Array:
    """`[n, n]`, zero but for the last row."""
    return jnp.where(is_last, values[None, :], 0.0)


def _of_corner(
    given: _FromKernels, lane: jax.Array, is_last: jax.Array
) -> tuple[Coefficients, Coefficients]:
    """Gradients of what the second half and the final states see of the chunk's start."""
    first, second = HALVES
    by_query, by_read = given.of_scores(second, first)
    by_query += _in_last_row(given.of_key(FactorRow.WRITE_S, first), is_last)
    d_decay = given.of_query(FactorRow.QUERY_S, second)
    d_decay += _at_last(given.of_scalar(ChunkScalar.DECAY), lane)
    d_lead = given.of_query(FactorRow.QUERY_N, second)
    d_lead += _at_last(given.of_scalar(ChunkScalar.LEAD), lane)
    return Coefficients(by_query, d_decay, d_lead), Coefficients(
        by_read, given.of_erase(FactorRow.READ_S, second), given.of_erase(FactorRow.READ_N, second)
    )


def _of_first_half(
    given: _FromKernels, x: Tokens, lane: jax.Array, is_last: jax.Array
) -> _HalfGradients:
    """By way of the end of the first half, which the second half and the final states see."""
    first, second = HALVES
    d_after, d_before = _of_corner(given, lane, is_last)
    decay, lead = (given.factors[FactorRow.SECOND_HALF, half] for half in HALVES)
    lift = exp(log_gate(x.log_alpha, second)) if given.explicit_p else 1.0
    own_lead = x.beta[second] * exp(jnp.cumsum(log_gate(x.log_mu, second)))
    after_decay, after_lead = lift * decay, lift * lead + own_lead
    by_gamma = d_after.gamma * after_decay[:, None] + d_before.gamma * decay[:, None]
    by_carry = d_after.gamma * after_lead[:, None] + d_before.gamma * lead[:, None]
    d_decay = jnp.sum(d_after.decay * after_decay + d_before.decay * decay)
    d_lead = jnp.sum(d_after.lead * after_decay + d_before.lead * decay)
    d_momentum = jnp.sum(d_after.lead * after_lead + d_before.lead * lead)
    momentum = given.scalar(ChunkScalar.MOMENTUM_2)
    return _HalfGradients(
        gamma=jnp.sum(by_gamma, axis=0),
        carry=jnp.sum(by_carry, axis=0) + momentum * given.of_key(FactorRow.WRITE_N, first),
        decay_before=given.of_erase(FactorRow.READ_S, first),
        lead_before=given.of_erase(FactorRow.READ_N, first),
        decay=given.of_query(FactorRow.QUERY_S, first) + _at_last(d_decay, lane),
        lead=given.of_query(FactorRow.QUERY_N, first) + _at_last(d_lead, lane),
        momentum=d_momentum + momentum * given.of_scalar(ChunkScalar.MOMENTUM),
    )


def _of_second_half(
    given: _FromKernels, eta: Leaf, lane: jax.Array, is_last: jax.Array
) -> _HalfGradients:
    """By way of the decay and lead that take the first half's end to the steps of the second."""
    first, second = HALVES
    d_after, d_before = _of_corner(given, lane, is_last)
    gamma, carry = (eta[first] * given.factors[FactorRow.FIRST_END, half] for half in HALVES)
    decay, lead, momentum = (
        given.scalar(i) for i in (ChunkScalar.DECAY_1, ChunkScalar.LEAD_1, ChunkScalar.MOMENTUM_1)
    )

    def own(d: Coefficients) -> tuple[jax.Array, jax.Array]:
        d_decay = jnp.sum(d.gamma * gamma[None, :], axis=1)
        d_lead = jnp.sum(d.gamma * carry[None, :], axis=1)
        return d_decay + d.decay * decay + d.lead * lead, d_lead + d.lead * momentum

    decay_before, lead_before = own(d_before)
    after_decay, after_lead = own(d_after)
    by_carry = jnp.sum(carry * given.of_key(FactorRow.WRITE_N, first))
    return _HalfGradients(
        gamma=given.of_key(FactorRow.WRITE_S, second),
        carry=given.of_key(FactorRow.WRITE_N, second),
        decay_before=decay_before,
        lead_before=lead_before,
        decay=after_decay,
        lead=after_lead,
        momentum=by_carry + momentum * given.of_scalar(ChunkScalar.MOMENTUM),
    )


def _through_coefficients(
    half: Half,
    beta: jax.Array,
    *,
    d_after: Coefficients,
    d_before: Coefficients,
    d_carry: jax.Array,
    d_momentum: jax.Array,
    precision: Precision,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of the gates from those of a half's coefficients.

    A gate of step `u + 1` takes part in every path from a write before it (or from the entering
    states) to a step after it. Such a path crosses the boundary between `u` and `u + 1`, so all of
    them together are a product of what arrives at `u` and what goes on from there: sums of products
    of coefficients alone. (Differences of sums would lose the gradient of a strong gate beside a
    weak one.)

    Args:
      half: the coefficients.
      beta: `[n]`.
      d_after: gradient of `half.after`.
      d_before: gradient of `half.before`.
      d_carry: `[n]` gradient of the last row of `half.carry`.
      d_momentum: gradient of the last entry of `half.momentum`.
      precision: of the products.

    Returns:
      Of log alpha and log mu `[n]`, that of step `u + 1` at `u` and that of step 0 at the end; of
      beta `[n]`.
    """
    size = beta.shape[0]
    t, u = iotas(size)
    # no path crosses the end: that column, empty in segment_decay,
    # gamma_carried and carry, takes the half's start
    at_end = lanes(size) == size - 1
    # after = lift * before + beta * (carry or momentum)
    lift = 1.0 if half.lift is None else half.lift
    by_row = 1.0 if half.lift is None else half.lift[:, None]
    d_gamma = d_before.gamma + by_row * d_after.gamma
    d_decay = d_before.decay + lift * d_after.decay
    d_lead = d_before.lead + lift * d_after.lead

    def arriving(d_rows: jax.Array, d_entering: jax.Array) -> jax.Array:
        """Gradient `[t, u]` of the momentum that has arrived at step u."""
        through = dot(d_rows, half.carry.T, precision)
        return through + d_entering[:, None] * half.momentum[None, :]

    by_before = arriving(d_gamma, d_lead)
    by_after = arriving(d_after.gamma, d_after.lead)
    d_beta = jnp.sum(
        times(half.segment_decay, by_before) + jnp.where(t == u, by_after, 0.0), axis=0
    )

    onward = beta[:, None] * jnp.where(t > u, half.carry, 0.0)
    d_log_mu = jnp.sum(times(half.gamma_carried, by_before) + times(onward, by_after), axis=0)
    entered = jnp.sum(d_before.lead * half.before.lead + d_after.lead * half.after.lead)
    by_end = jnp.cumsum(jnp.where(at_end, 0.0, d_carry * half.carry_last))
    d_log_mu += jnp.where(at_end, entered, by_end) + d_momentum * half.momentum_last

    crossing = (
        dot(d_gamma, half.after.gamma.T, precision)
        + d_lead[:, None] * half.after.lead[None, :]
        + d_decay[:, None] * half.after.decay[None, :]
    )
    d_log_alpha = times(half.segment_decay, crossing)
    entered = d_decay * half.before.decay
    if half.lift is not None:
        # the decay up to step t - 1 is what the step reads, and lift takes it on
        d_lift = jnp.sum(d_after.gamma * half.before.gamma, axis=1)
        d_lift += d_after.lead * half.before.lead + d_after.decay * half.before.decay
        own = (d_lift * half.lift)[:, None]
        next_step = t == lax.rem(u + 1, size)
        d_log_alpha = jnp.where(next_step, own, jnp.where(t > u + 1, d_log_alpha, 0.0))
        entered = jnp.where(lanes(size) == 0, 0.0, entered)
    d_log_alpha = jnp.sum(d_log_alpha, axis=0) + jnp.where(at_end, jnp.sum(entered), 0.0)
    return d_log_alpha, d_log_mu, d_beta
