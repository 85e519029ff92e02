"""The last backward kernel: gradients of the gates from those of the coefficients, half by half.

Formulas: docs/algorithm.md, section 5; the halves and their names: coefficients.py.
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
    Half,
    Sight,
    exp,
    half_coefficients,
    iotas,
    lanes,
    log_gate,
)
from pallas_kernels.momentum_delta.isolation import times
from pallas_kernels.momentum_delta.rows import GRADIENT_ROWS, ChunkScalar, FactorRow
from pallas_kernels.momentum_delta.scores import FromScores
from pallas_kernels.momentum_delta.types import CHUNK, HALF, HALVES, Leaf, Options, Prepared, Tokens


class GateGradients(NamedTuple):
    """Gradients of the gates, `[B, T, HV]` float32."""

    log_alpha: Leaf
    log_mu: Leaf
    beta: Leaf
    eta: Leaf


def gate_gradients(
    x: Tokens, prepared: Prepared, rows: jax.Array, scores: FromScores, options: Options
) -> GateGradients:
    """The ninth kernel, half a chunk a program.

    Args:
      x: the call's tokens.
      prepared: from the forward pass.
      rows: gradients of the row factors, `FromStates.rows`.
      scores: from the seventh kernel.
      options: of the call.
    """
    z = x.sizes
    specs = ChunkSpecs(z, len(HALVES))
    gate, matrix = specs.gate(), specs.matrix()
    blocks = rows.shape[3]
    return kernel_call(
        partial(
            _gate_gradients,
            half_of=specs.block,
            blocks=blocks,
            explicit_p=x.p is not None,
            precision=options.numerics.coefficients,
        ),
        x._replace(q=None, k=None, v=None, p=None),
        (scores.attention, scores.overlap),
        scores.unit,
        rows,
        prepared.factors,
        name="mdn_gate_gradients",
        grid=specs.grid,
        in_specs=[
            Tokens(None, None, None, None, gate, gate, gate, gate),
            (matrix, matrix),
            specs.units(scores.unit),
            specs.array(blocks, GRADIENT_ROWS, CHUNK),
            specs.factors(),
        ],
        out_specs=GateGradients(gate, gate, gate, gate),
        out_shape=GateGradients(z.gate, z.gate, z.gate, z.gate),
        warps=options.tiles.gates_warps,
        stages=1,
        interpret=options.interpret,
    )


class Cotangents(NamedTuple):
    """What reaches the coefficients of half a chunk from outside of its own square.

    Attributes:
      gamma: `[n]` gradient of the last row of gamma.
      w: `[n]` gradient of the last row of w.
      read_total: `[n]` gradient of `read.total`, and so on.
      read_lead: `[n]`.
      out_total: `[n]`.
      out_lead: `[n]`.
      momentum: of the momentum at the end, a scalar.
    """

    gamma: jax.Array
    w: jax.Array
    read_total: jax.Array
    read_lead: jax.Array
    out_total: jax.Array
    out_lead: jax.Array
    momentum: jax.Array


def _gate_gradients(x, scores, unit, rows, factors, out, *, half_of, blocks, explicit_p, precision):
    # one code for both halves: two would not fit into the instruction cache together
    index = half_of(pl.program_id(0))
    at = pl.ds(index * HALF, HALF)
    first, second = HALVES
    lane, is_last = lanes(HALF), iotas(HALF)[0] == HALF - 1

    def summed(row: int, part: Leaf) -> jax.Array:
        parts = [rows[i, row, part] for i in range(blocks)]
        return sum(parts[1:], parts[0])

    def of_key(row: int, part: Leaf) -> jax.Array:
        return factors[FactorRow.NORM_K, part] * summed(row, part)

    def of_query(row: int, part: Leaf) -> jax.Array:
        return factors[FactorRow.NORM_Q, part] * summed(row, part)

    def of_erase(row: int, part: Leaf) -> jax.Array:
        return summed(row, part) if explicit_p else of_key(row, part)

    def loaded(row: Leaf, column: Leaf) -> tuple[jax.Array, jax.Array]:
        tiles = tuple(matrix[row, column].astype(jnp.float32) for matrix in scores)
        if unit is None:
            return tiles
        return tuple(tile * unit[i] for i, tile in enumerate(tiles))

    def at_last(value: jax.Array) -> jax.Array:
        return jnp.where(lane == HALF - 1, value, 0.0)

    def in_last_row(values: jax.Array) -> jax.Array:
        return jnp.where(is_last, values[None, :], 0.0)

    def keep(number: int) -> jax.Array:
        return factors[FactorRow.SCALARS, number]

    def d_keep(number: int) -> jax.Array:
        parts = [rows[i, FactorRow.SCALARS, number] for i in range(blocks)]
        return sum(parts[1:], parts[0])

    def corner() -> tuple[Sight, Sight]:
        """Gradients of what the second half and the final states see of the chunk's start."""
        by_query, by_read = loaded(second, first)
        by_query += in_last_row(of_key(FactorRow.WRITE_S, first))
        d_total = of_query(FactorRow.QUERY_S, second) + at_last(d_keep(ChunkScalar.DECAY))
        d_lead = of_query(FactorRow.QUERY_N, second) + at_last(d_keep(ChunkScalar.LEAD))
        return Sight(by_query, d_total, d_lead), Sight(
            by_read, of_erase(FactorRow.READ_S, second), of_erase(FactorRow.READ_N, second)
        )

    def of_first() -> Cotangents:
        d_query, d_read = corner()
        total, lead = factors[FactorRow.SECOND_HALF, first], factors[FactorRow.SECOND_HALF, second]
        lift = exp(log_gate(x.log_alpha, second)) if explicit_p else 1.0
        own_lead = x.beta[second] * exp(jnp.cumsum(log_gate(x.log_mu, second)))
        out_total, out_lead = lift * total, lift * lead + own_lead
        by_gamma = d_query.gamma * out_total[:, None] + d_read.gamma * total[:, None]
        by_w = d_query.gamma * out_lead[:, None] + d_read.gamma * lead[:, None]
        d_total = jnp.sum(d_query.total * out_total + d_read.total * total)
        d_lead = jnp.sum(d_query.lead * out_total + d_read.lead * total)
        d_momentum = jnp.sum(d_query.lead * out_lead + d_read.lead * lead)
        momentum = keep(ChunkScalar.MOMENTUM_2)
        return Cotangents(
            gamma=jnp.sum(by_gamma, axis=0),
            w=jnp.sum(by_w, axis=0) + momentum * of_key(FactorRow.WRITE_N, first),
            read_total=of_erase(FactorRow.READ_S, first),
            read_lead=of_erase(FactorRow.READ_N, first),
            out_total=of_query(FactorRow.QUERY_S, first) + at_last(d_total),
            out_lead=of_query(FactorRow.QUERY_N, first) + at_last(d_lead),
            momentum=d_momentum + momentum * d_keep(ChunkScalar.MOMENTUM),
        )

    def of_second() -> Cotangents:
        d_query, d_read = corner()
        gamma, w = (x.eta[first] * factors[FactorRow.FIRST_END, half] for half in HALVES)
        total, lead, momentum = (
            keep(i) for i in (ChunkScalar.DECAY_1, ChunkScalar.LEAD_1, ChunkScalar.MOMENTUM_1)
        )

        def own(d: Sight) -> tuple[jax.Array, jax.Array]:
            d_total = jnp.sum(d.gamma * gamma[None, :], axis=1)
            d_lead = jnp.sum(d.gamma * w[None, :], axis=1)
            return d_total + d.total * total + d.lead * lead, d_lead + d.lead * momentum

        read_total, read_lead = own(d_read)
        out_total, out_lead = own(d_query)
        by_w = jnp.sum(w * of_key(FactorRow.WRITE_N, first))
        return Cotangents(
            gamma=of_key(FactorRow.WRITE_S, second),
            w=of_key(FactorRow.WRITE_N, second),
            read_total=read_total,
            read_lead=read_lead,
            out_total=out_total,
            out_lead=out_lead,
            momentum=by_w + momentum * d_keep(ChunkScalar.MOMENTUM),
        )

    d = lax.cond(index == 0, of_first, of_second)
    eta = x.eta[at]
    log_alpha, log_mu = log_gate(x.log_alpha, at), log_gate(x.log_mu, at)
    half = half_coefficients(log_alpha, log_mu, x.beta[at], explicit_p, precision)
    by_query, by_read = loaded(at, at)
    by_query += in_last_row(d.gamma)
    d_eta = by_query * half.out.gamma + by_read * half.read.gamma
    out.eta[at] = jnp.sum(d_eta, axis=0) + d.w * half.w_end
    d_log_alpha, d_log_mu, d_beta = _half_gradients(
        half,
        x.beta[at],
        d_out=Sight(by_query * eta[None, :], d.out_total, d.out_lead),
        d_read=Sight(by_read * eta[None, :], d.read_total, d.read_lead),
        d_w=eta * d.w,
        d_momentum=d.momentum,
        precision=precision,
    )
    following = index * HALF + lax.rem(lane + 1, HALF)
    out.beta[at] = d_beta
    out.log_alpha[following], out.log_mu[following] = d_log_alpha, d_log_mu


def _half_gradients(
    half: Half,
    beta: jax.Array,
    *,
    d_out: Sight,
    d_read: Sight,
    d_w: jax.Array,
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
      d_out: gradient of `half.out`.
      d_read: gradient of `half.read`.
      d_w: `[n]` gradient of the last row of `half.w`.
      d_momentum: gradient of the last entry of `half.momentum`.
      precision: of the products.

    Returns:
      Of log alpha and log mu `[n]`, that of step `u + 1` at `u` and that of step 0 at the end; of
      beta `[n]`.
    """
    size = beta.shape[0]
    t, u = iotas(size)
    # no path crosses the end: that column, empty in a, later and w, takes the half's start
    at_end = lanes(size) == size - 1
    # out = lift * read + beta * (w or momentum)
    lift = 1.0 if half.lift is None else half.lift
    by_row = 1.0 if half.lift is None else half.lift[:, None]
    d_gamma = d_read.gamma + by_row * d_out.gamma
    d_total = d_read.total + lift * d_out.total
    d_lead = d_read.lead + lift * d_out.lead

    def arriving(d_rows: jax.Array, d_entering: jax.Array) -> jax.Array:
        """Gradient `[t, u]` of the momentum that has arrived at step u."""
        through = dot(d_rows, half.w.T, precision)
        return through + d_entering[:, None] * half.momentum[None, :]

    by_read = arriving(d_gamma, d_lead)
    by_out = arriving(d_out.gamma, d_out.lead)
    d_beta = jnp.sum(times(half.a, by_read) + jnp.where(t == u, by_out, 0.0), axis=0)

    onward = beta[:, None] * jnp.where(t > u, half.w, 0.0)
    d_log_mu = jnp.sum(times(half.later, by_read) + times(onward, by_out), axis=0)
    entered = jnp.sum(d_read.lead * half.read.lead + d_out.lead * half.out.lead)
    by_end = jnp.cumsum(jnp.where(at_end, 0.0, d_w * half.w_end))
    d_log_mu += jnp.where(at_end, entered, by_end) + d_momentum * half.momentum_end

    crossing = (
        dot(d_gamma, half.out.gamma.T, precision)
        + d_lead[:, None] * half.out.lead[None, :]
        + d_total[:, None] * half.out.total[None, :]
    )
    d_log_alpha = times(half.a, crossing)
    entered = d_total * half.read.total
    if half.lift is not None:
        # the decay up to step t - 1 is what the error sees, and lift takes it on
        d_lift = jnp.sum(d_out.gamma * half.read.gamma, axis=1)
        d_lift += d_out.lead * half.read.lead + d_out.total * half.read.total
        own = (d_lift * half.lift)[:, None]
        next_step = t == lax.rem(u + 1, size)
        d_log_alpha = jnp.where(next_step, own, jnp.where(t > u + 1, d_log_alpha, 0.0))
        entered = jnp.where(lanes(size) == 0, 0.0, entered)
    d_log_alpha = jnp.sum(d_log_alpha, axis=0) + jnp.where(at_end, jnp.sum(entered), 0.0)
    return d_log_alpha, d_log_mu, d_beta
