"""Backward kernels inside a chunk: gradients of the scores, then of the gates.

Formulas: docs/algorithm.md, section 5.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import coefficient_precision, dot, exact, kernel_call
from pallas_kernels.momentum_delta import layout
from pallas_kernels.momentum_delta.backward import KeyGradients
from pallas_kernels.momentum_delta.coefficients import decays
from pallas_kernels.momentum_delta.layout import CHUNK, ChunkSpecs, Leaf, Options, Prepared, Tokens


class FromScores(NamedTuple):
    """What the scores inside a chunk give.

    Attributes:
      keys: the complete gradients, in q's dtype.
      attention: gradient of `gamma eta` in the output, `[B, HV, NT, C, C]`.
      overlap: gradient of `gamma_read eta` in the error, same shape.
    """

    keys: KeyGradients
    attention: Leaf
    overlap: Leaf


def score_gradients(
    x: Tokens,
    prepared: Prepared,
    values: tuple[jax.Array, jax.Array, jax.Array],
    from_states: KeyGradients,
    options: Options,
) -> FromScores:
    """The seventh kernel. Grid (NT, B * HV, 1).

    Args:
      x: the call's tokens.
      prepared: from the forward pass.
      values: `d_o`, `d_v` and `error`, `[B, T, HV, V]`.
      from_states: gradients by way of the states, to which those of the scores are added.
      options: of the call.
    """
    z = x.sizes
    specs = ChunkSpecs(z)
    keys, gate = specs.tokens(z.key_dim, z.heads), specs.gate()
    p = None if x.p is None else specs.tokens(z.key_dim, z.p_heads)
    per_head, gradient = specs.tokens(z.key_dim, z.value_heads), z.per_head(z.key_dim, x.q.dtype)
    key_specs = KeyGradients(per_head, per_head, None if p is None else per_head)
    key_shapes = KeyGradients(gradient, gradient, None if p is None else gradient)
    matrix = z.per_chunk(CHUNK, CHUNK, dtype=x.q.dtype)
    return kernel_call(
        partial(
            _score_gradients,
            value_dim=z.value_dim,
            block_v=min(options.tiles.scores_block_v, z.value_dim),
            options=options,
        ),
        x._replace(v=None, log_alpha=x.log_alpha if x.p is not None else None),
        values,
        from_states,
        prepared.gamma,
        prepared.factors,
        name="mdn_score_gradients",
        grid=(z.chunks, z.batch * z.value_heads, 1),
        in_specs=[
            Tokens(keys, keys, None, p, None if p is None else gate, gate, gate, gate),
            (specs.tokens(z.value_dim, z.value_heads),) * 3,
            key_specs,
            specs.matrix(),
            specs.factors(),
        ],
        out_specs=FromScores(key_specs, specs.matrix(), specs.matrix()),
        out_shape=FromScores(key_shapes, matrix, matrix),
        warps=options.tiles.scores_warps,
        stages=options.tiles.scores_stages,
        interpret=options.interpret,
    )


def _score_gradients(x, values, from_states, gamma, factors, out, *, value_dim, block_v, options):
    do_ref, dv_ref, error_ref = values
    precision, dtype = exact(options.interpret), x.q.dtype

    # loads that would stall after the loop
    log_mu, beta, eta = x.log_mu[...], x.beta[...], x.eta[...]
    norm_q, norm_k = factors[layout.NORM_Q, :], factors[layout.NORM_K, :]
    gamma_read = gamma[...]

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        columns = pl.ds(i * block_v, block_v)
        error_t = error_ref[:, columns].T
        return (
            carry[0] + dot(do_ref[:, columns], error_t, precision),
            carry[1] + dot(dv_ref[:, columns], error_t, precision),
        )

    square = jnp.zeros((CHUNK, CHUNK), jnp.float32)
    by_output, by_error = lax.fori_loop(0, value_dim // block_v, step, (square, square))
    t, j = layout.iotas()
    norm_p = norm_k if x.p is None else jnp.ones_like(norm_k)
    by_output = jnp.where(t >= j, by_output, 0.0) * norm_q[:, None] * norm_k[None, :]
    by_error = jnp.where(t > j, -by_error, 0.0) * norm_p[:, None] * norm_k[None, :]

    q, k = x.q[...], x.k[...]
    p = k if x.p is None else x.p[...]
    k_t = k.T
    out.attention[...] = (by_output * dot(q, k_t, precision)).astype(dtype)
    out.overlap[...] = (by_error * dot(p, k_t, precision)).astype(dtype)

    to_mu = jnp.cumsum(log_mu)
    exponents = jnp.minimum(to_mu[:, None] - to_mu[None, :], 0.0)
    w = jnp.where(t >= j, jnp.exp(exponents), 0.0)
    gamma_read = gamma_read.astype(jnp.float32)
    lifted = gamma_read if x.p is None else jnp.exp(x.log_alpha[...])[:, None] * gamma_read
    eta = eta[None, :]
    by_output = (by_output * (lifted + beta[:, None] * w) * eta).astype(dtype)
    by_error = by_error * gamma_read * eta
    d_q = from_states.q[...].astype(jnp.float32) + dot(by_output, k, precision)
    d_k = from_states.k[...].astype(jnp.float32) + dot(by_output.T, q, precision)
    if x.p is None:
        d_k += dot((by_error + by_error.T).astype(dtype), k, precision)
    else:
        by_error = by_error.astype(dtype)
        d_k += dot(by_error.T, p, precision)
        d_p = from_states.p[...].astype(jnp.float32) + dot(by_error, k, precision)
        out.keys.p[...] = d_p.astype(dtype)

    def through_norm(gradient: jax.Array, keys: jax.Array, norm: jax.Array) -> jax.Array:
        wide = keys.astype(jnp.float32)
        along = jnp.sum(gradient * wide, axis=1) * norm * norm
        return gradient - wide * along[:, None]

    if options.normalize:
        d_q = through_norm(d_q, q, norm_q * (1.0 / options.scale))
        d_k = through_norm(d_k, k, norm_k)
    out.keys.q[...] = d_q.astype(dtype)
    out.keys.k[...] = d_k.astype(dtype)


class GateGradients(NamedTuple):
    """Gradients of the gates, `[B, T, HV]` float32."""

    log_alpha: Leaf
    log_mu: Leaf
    beta: Leaf
    eta: Leaf


def gates(
    x: Tokens, prepared: Prepared, rows: jax.Array, scores: FromScores, options: Options
) -> GateGradients:
    """The eighth kernel. Grid (NT, B * HV, 1).

    Args:
      x: the call's tokens.
      prepared: from the forward pass.
      rows: gradients of the row factors, `FromStates.rows`.
      scores: from the seventh kernel.
      options: of the call.
    """
    z = x.sizes
    specs = ChunkSpecs(z)
    gate, matrix = specs.gate(), specs.matrix()
    blocks = rows.shape[3]
    return kernel_call(
        partial(
            _gates,
            blocks=blocks,
            explicit_p=x.p is not None,
            precision=coefficient_precision(x.q.dtype, options.interpret),
        ),
        x._replace(q=None, k=None, v=None, p=None),
        (scores.attention, scores.overlap),
        rows,
        prepared.gamma,
        prepared.factors,
        name="mdn_gates",
        grid=(z.chunks, z.batch * z.value_heads, 1),
        in_specs=[
            Tokens(None, None, None, None, gate, gate, gate, gate),
            (matrix, matrix),
            specs.array(blocks, layout.ROW_GRADIENTS, CHUNK),
            matrix,
            specs.factors(),
        ],
        out_specs=GateGradients(gate, gate, gate, gate),
        out_shape=GateGradients(z.gate, z.gate, z.gate, z.gate),
        warps=options.tiles.gates_warps,
        stages=1,
        interpret=options.interpret,
    )


def _gates(x, scores, rows, gamma_ref, factors, out, *, blocks, explicit_p, precision):
    # all loads first: each would stall where it is used
    by_attention, by_overlap, gamma_read = scores[0][...], scores[1][...], gamma_ref[...]
    log_alpha, log_mu, beta, eta = (y[...] for y in (x.log_alpha, x.log_mu, x.beta, x.eta))
    norm_q, norm_k = factors[layout.NORM_Q, :], factors[layout.NORM_K, :]
    d_rows = [
        sum((rows[i, index, :] for i in range(1, blocks)), rows[0, index, :])
        for index in range(layout.ROW_GRADIENTS)
    ]
    norm_p = jnp.ones_like(norm_k) if explicit_p else norm_k
    lane = layout.lanes()

    def at_end(index: int) -> jax.Array:  # the gradient of KEEP[index], at the last step
        value = jnp.sum(jnp.where(lane == index, d_rows[layout.KEEP], 0.0))
        return jnp.where(lane == CHUNK - 1, value, 0.0)

    t, j = layout.iotas()
    last = t == CHUNK - 1
    d = decays(log_alpha, log_mu, explicit_p)
    gamma_read = gamma_read.astype(jnp.float32)
    gamma = gamma_read if d.lift is None else d.lift[:, None] * gamma_read
    gamma += beta[:, None] * d.w

    # the chunk's final states read the last rows of gamma and w
    by_write_s = norm_k * d_rows[layout.WRITE_S]
    by_write_n = norm_k * d_rows[layout.WRITE_N]
    d_gamma = by_attention.astype(jnp.float32)
    d_gamma += jnp.where(last, by_write_s[None, :], 0.0)
    d_read = by_overlap.astype(jnp.float32)
    d_eta = jnp.sum(d_gamma * gamma + d_read * gamma_read, axis=0)
    d_eta += by_write_n * jnp.sum(jnp.where(last, d.w, 0.0), axis=0)
    out.eta[...] = d_eta
    d_gamma *= eta[None, :]
    d_read *= eta[None, :]
    d_read += d_gamma if d.lift is None else d.lift[:, None] * d_gamma

    a_beta = d.a * beta[None, :]
    d_lead = norm_q * d_rows[layout.QUERY_N] + at_end(layout.KEEP_NS)
    d_total = norm_q * d_rows[layout.QUERY_S] + at_end(layout.KEEP_SS)
    lift = 1.0 if d.lift is None else d.lift
    d_lead_read = norm_p * d_rows[layout.READ_N] + lift * d_lead
    d_total_a = norm_p * d_rows[layout.READ_S] + lift * d_total

    d_w = dot(a_beta.T, d_read, precision) + beta[:, None] * d_gamma
    d_w += jnp.where(last, (eta * by_write_n)[None, :], 0.0)
    d_a_beta = dot(d_read, d.w.T, precision) + d_lead_read[:, None] * d.total_w[None, :]
    d_total_w = beta * d_lead + jnp.sum(d_lead_read[:, None] * a_beta, axis=0)
    d_total_w += at_end(layout.KEEP_NN)
    out.beta[...] = (
        jnp.sum(d_gamma * d.w, axis=1) + d_lead * d.total_w + jnp.sum(d_a_beta * d.a, axis=0)
    )

    # A product over a segment is sensitive to the log of each of its gates alike: step s takes
    # part in those that start before it and end at or after it. Sums of those entries alone, for
    # differences of larger sums would lose the gradient of a strong gate beside a weak one.
    ends_at = (j >= t) if d.lift is None else (j > t)

    def through(segments: jax.Array, reached: jax.Array) -> jax.Array:
        ending = dot(jnp.where(reached, 1.0, 0.0), segments, precision)
        return jnp.sum(jnp.where(t > j, ending, 0.0), axis=1)

    def from_start(totals: jax.Array, reached: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(reached, totals[None, :], 0.0), axis=1)

    out.log_mu[...] = through(d_w * d.w, j >= t) + from_start(d_total_w * d.total_w, j >= t)
    d_log_alpha = through(d_a_beta * a_beta, ends_at) + from_start(d_total_a * d.total_a, ends_at)
    if d.lift is not None:
        lead_read = jnp.sum(a_beta * d.total_w[None, :], axis=1)
        d_lift = jnp.sum(d_gamma * gamma_read, axis=1) + d_lead * lead_read + d_total * d.total_a
        d_log_alpha += d_lift * d.lift
    out.log_alpha[...] = d_log_alpha
