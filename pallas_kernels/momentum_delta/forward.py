"""Forward kernels: advance walks the chunks, prepare and output take one chunk each."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import coefficient_precision, dot, exact, kernel_call
from pallas_kernels.momentum_delta import layout
from pallas_kernels.momentum_delta.coefficients import (
    coefficients,
    decays,
    inverse_norm,
    unit_lower_inverse,
)
from pallas_kernels.momentum_delta.layout import (
    CHUNK,
    ChunkSpecs,
    Leaf,
    Options,
    Prepared,
    States,
    Tokens,
    WalkSpecs,
)


def prepare(x: Tokens, options: Options) -> Prepared:
    """The first kernel: all of a chunk that needs no state. Grid (NT, B * HV, 1)."""
    z = x.sizes
    specs = ChunkSpecs(z)
    keys, gate = specs.tokens(z.key_dim, z.heads), specs.gate()
    p = None if x.p is None else specs.tokens(z.key_dim, z.p_heads)
    matrix = z.per_chunk(CHUNK, CHUNK, dtype=x.q.dtype)
    return kernel_call(
        partial(_prepare, options=options),
        x._replace(v=None),
        name="mdn_prepare",
        grid=(z.chunks, z.batch * z.value_heads, 1),
        in_specs=[Tokens(keys, keys, None, p, gate, gate, gate, gate)],
        out_specs=Prepared(specs.matrix(), specs.matrix(), specs.matrix(), specs.factors()),
        out_shape=Prepared(
            matrix, matrix, matrix, z.per_chunk(layout.FACTORS, CHUNK, dtype=jnp.float32)
        ),
        warps=options.tiles.prepare_warps,
        stages=1,
        interpret=options.interpret,
    )


def _prepare(x, out, *, options):
    q, k = x.q[...], x.k[...]
    log_alpha, log_mu, beta, eta = (y[...] for y in (x.log_alpha, x.log_mu, x.beta, x.eta))
    precision = exact(options.interpret)
    coarse = coefficient_precision(q.dtype, options.interpret)
    norm_q = options.scale * inverse_norm(q, options.normalize)
    norm_k = inverse_norm(k, options.normalize)
    p, norm_p = (k, norm_k) if x.p is None else (x.p[...], jnp.ones_like(norm_k))
    d = decays(log_alpha, log_mu, explicit_p=x.p is not None)
    co = coefficients(d, beta, coarse)
    write = eta * norm_k

    k_t = k.T
    scores = dot(q, k_t, precision) * norm_q[:, None] * write[None, :]
    out.attention[...] = (scores * co.gamma).astype(q.dtype)
    overlap = dot(p, k_t, precision) * norm_p[:, None] * write[None, :]
    inverse = unit_lower_inverse(overlap * co.gamma_read, coarse)
    out.inverse[...] = inverse.astype(q.dtype)
    out.gamma[...] = co.gamma_read.astype(q.dtype)

    lane, last_row = layout.lanes(), layout.iotas()[0] == CHUNK - 1

    def at_end(steps: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(lane == CHUNK - 1, steps, 0.0))

    def end_row(matrix: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(last_row, matrix, 0.0), axis=0)

    out.factors[layout.READ_S, :] = d.total_a * norm_p
    out.factors[layout.READ_N, :] = co.lead_read * norm_p
    out.factors[layout.WRITE_S, :] = write * end_row(co.gamma)
    out.factors[layout.WRITE_N, :] = write * end_row(d.w)
    out.factors[layout.QUERY_S, :] = norm_q * co.total
    out.factors[layout.QUERY_N, :] = norm_q * co.lead
    out.factors[layout.NORM_Q, :] = norm_q
    out.factors[layout.NORM_K, :] = norm_k
    keep = jnp.where(lane == layout.KEEP_SS, at_end(co.total), 0.0)
    keep = jnp.where(lane == layout.KEEP_NS, at_end(co.lead), keep)
    out.factors[layout.KEEP, :] = jnp.where(lane == layout.KEEP_NN, at_end(d.total_w), keep)


class Advanced(NamedTuple):
    """What the walk over the chunks gives.

    Attributes:
      error: `v'`, the error of every step before its write, `[B, T, HV, V]` in v's dtype.
      kept: the states entering each chunk, in v's dtype.
      final: the states after the last step, float32.
    """

    error: Leaf
    kept: States
    final: States


def advance(x: Tokens, prepared: Prepared, state: States, options: Options) -> Advanced:
    """The second kernel, sequential over chunks. Grid (V / block, B, HV)."""
    z = x.sizes
    block = options.tiles.advance_block_v
    specs = WalkSpecs(z, block)
    p = None if x.p is None else specs.keys(z.p_heads)
    values = specs.values()
    return kernel_call(
        partial(_advance, chunks=z.chunks, precision=exact(options.interpret)),
        (x.k, x.p, x.v, prepared.inverse, prepared.factors),
        state,
        name="mdn_advance",
        grid=(z.value_dim // block, z.batch, z.value_heads),
        in_specs=[
            (specs.keys(z.heads), p, values, specs.matrix(), specs.factors()),
            specs.state(),
        ],
        out_specs=Advanced(values, specs.kept(), specs.state()),
        out_shape=Advanced(
            z.per_head(z.value_dim, x.v.dtype), z.states(x.v.dtype), States(z.state, z.state)
        ),
        warps=options.tiles.advance_warps,
        stages=options.tiles.advance_stages,
        interpret=options.interpret,
    )


def _advance(x, state, out, *, chunks, precision):
    k_ref, p_ref, v_ref, inverse_ref, factor_ref = x
    dtype = v_ref.dtype

    def factors(c: jax.Array) -> tuple[jax.Array, ...]:
        rows = range(layout.READ_S, layout.WRITE_N + 1)
        keeps = (layout.KEEP_SS, layout.KEEP_NS, layout.KEEP_NN)
        return (
            *(factor_ref[c, row, :] for row in rows),
            *(factor_ref[c, layout.KEEP, i] for i in keeps),
        )

    def step(c: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # s, n are [K, block] float32; the rows were loaded a step ahead, off the critical path
        s, n, read_s, read_n, write_s, write_n, keep_ss, keep_ns, keep_nn = carry
        following = factors(jnp.minimum(c + 1, chunks - 1))
        steps = pl.ds(c * CHUNK, CHUNK)
        # the order of loads, stores and products is the measured one: others cost up to 40 %
        low_s, low_n = s.astype(dtype), n.astype(dtype)
        out.kept.s[c], out.kept.n[c] = low_s, low_n
        k = k_ref[steps, :]
        p = k if p_ref is None else p_ref[steps, :]
        residual = (
            v_ref[steps, :].astype(jnp.float32)
            - read_s[:, None] * dot(p, low_s, precision)
            - read_n[:, None] * dot(p, low_n, precision)
        )
        error = dot(inverse_ref[c], residual.astype(dtype), precision)
        out.error[steps, :] = error.astype(dtype)
        k_t = k.T

        def write(by: jax.Array) -> jax.Array:
            return dot(k_t, (error * by[:, None]).astype(dtype), precision)

        s, n = keep_ss * s + keep_ns * n + write(write_s), keep_nn * n + write(write_n)
        return s, n, *following

    carry = (state.s[...], state.n[...], *factors(jnp.int32(0)))
    s, n, *_ = lax.fori_loop(0, chunks, step, carry)
    out.final.s[...], out.final.n[...] = s, n


def output(
    x: Tokens, prepared: Prepared, error: jax.Array, kept: States, options: Options
) -> jax.Array:
    """The third kernel: o `[B, T, HV, V]`. Grid (NT, B * HV, V / block)."""
    z = x.sizes
    block = options.tiles.output_block_v
    specs = ChunkSpecs(z)
    values = specs.tokens(block, z.value_heads, blocked=True)
    return kernel_call(
        partial(_output, precision=exact(options.interpret)),
        x.q,
        error,
        prepared.attention,
        prepared.factors,
        kept,
        name="mdn_output",
        grid=(z.chunks, z.batch * z.value_heads, z.value_dim // block),
        in_specs=[
            specs.tokens(z.key_dim, z.heads),
            values,
            specs.matrix(),
            specs.factors(),
            specs.states(z.key_dim, block, cut="v"),
        ],
        out_specs=values,
        out_shape=z.per_head(z.value_dim, x.v.dtype),
        warps=options.tiles.output_warps,
        stages=1,
        interpret=options.interpret,
    )


def _output(q, error, attention, factors, kept, out, *, precision):
    queries = q[...]
    o = (
        factors[layout.QUERY_S, :][:, None] * dot(queries, kept.s[...], precision)
        + factors[layout.QUERY_N, :][:, None] * dot(queries, kept.n[...], precision)
        + dot(attention[...], error[...], precision)
    )
    out[...] = o.astype(out.dtype)
