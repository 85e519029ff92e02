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
    Ends,
    Quarters,
    after,
    diagonal,
    ends,
    half_coefficients,
    halves,
    inverse_norm,
    log_gate,
    lower_quarters,
    squares,
    unit_lower_inverse,
)
from pallas_kernels.momentum_delta.layout import (
    CHUNK,
    HALF,
    HALVES,
    ChunkSpecs,
    Leaf,
    Memory,
    Options,
    Prepared,
    States,
    Tokens,
    WalkSpecs,
)


def prepare(x: Tokens, options: Options) -> Prepared:
    """The first kernel: all of a chunk that needs no state."""
    z = x.sizes
    specs = ChunkSpecs(z)
    keys, gate = specs.tokens(z.key_dim, z.heads), specs.gate()
    p = None if x.p is None else specs.tokens(z.key_dim, z.p_heads)
    matrix = z.per_chunk(CHUNK, CHUNK, dtype=x.q.dtype)
    return kernel_call(
        partial(_prepare, options=options),
        x._replace(v=None),
        name="mdn_prepare",
        grid=specs.grid,
        in_specs=[Tokens(keys, keys, None, p, gate, gate, gate, gate)],
        out_specs=Prepared(specs.matrix(), specs.matrix(), specs.matrix(), specs.factors()),
        out_shape=Prepared(
            matrix, matrix, matrix, z.per_chunk(layout.FACTORS, CHUNK, dtype=jnp.float32)
        ),
        warps=options.tiles.prepare_warps,
        stages=1,
        interpret=options.interpret,
    )


class _Half(NamedTuple):
    """What is left of half a chunk when its coefficients are stored."""

    lower: jax.Array  # [n, n]
    ends: Ends
    read_total: jax.Array  # [n], as the following
    read_lead: jax.Array
    out_total: jax.Array
    out_lead: jax.Array


def _prepare(x, out, *, options):
    precision = exact(options.interpret)
    coarse = coefficient_precision(x.q.dtype, options.interpret)
    explicit_p = x.p is not None

    first, second = HALVES
    q, k = x.q[...], x.k[...]
    p = x.p[...] if explicit_p else k
    k_t = k.T
    overlaps = lower_quarters(dot(p, k_t, precision))
    norm_q = norm_k = halves(jnp.ones((CHUNK,), jnp.float32))
    if options.normalize:
        norm_q = halves(inverse_norm(squares(q)))
        if explicit_p or k.dtype == jnp.float32:
            norm_k = halves(inverse_norm(squares(k)))
        else:  # products of 16-bit numbers are exact
            norm_k = tuple(inverse_norm(diagonal(m)) for m in (overlaps.first, overlaps.second))
    norm_q = tuple(options.scale * norm for norm in norm_q)
    norm_p = halves(jnp.ones((CHUNK,), jnp.float32)) if explicit_p else norm_k
    write = tuple(x.eta[half] * norm for half, norm in zip(HALVES, norm_k, strict=True))

    def scaled(m: Quarters, norm: tuple[jax.Array, jax.Array]) -> Quarters:
        return Quarters(
            m.first * norm[0][:, None] * write[0][None, :],
            m.corner * norm[1][:, None] * write[0][None, :],
            m.second * norm[1][:, None] * write[1][None, :],
        )

    overlaps = scaled(overlaps, norm_p)
    scores = scaled(lower_quarters(dot(q, k_t, precision)), norm_q)

    def store(ref, row: pl.Slice, column: pl.Slice, value: jax.Array) -> None:
        ref[row, column] = value.astype(ref.dtype)

    def rows(index: int, values: tuple[jax.Array, ...], by: tuple[jax.Array, ...]) -> None:
        for half, value, factor in zip(HALVES, values, by, strict=True):
            out.factors[index, half] = value * factor

    one = jnp.float32(1)
    rows(layout.NORM_Q, norm_q, (one, one))
    rows(layout.NORM_K, norm_k, (one, one))

    def half_chunk(index: jax.Array, carry: tuple[_Half, _Half]) -> tuple[_Half, _Half]:
        at = pl.ds(index * HALF, HALF)
        log_alpha, log_mu = log_gate(x.log_alpha, at), log_gate(x.log_mu, at)
        half = half_coefficients(log_alpha, log_mu, x.beta[at], explicit_p, coarse)
        store(out.gamma, at, at, half.read.gamma)
        score = jnp.where(index == 0, scores.first, scores.second)
        overlap = jnp.where(index == 0, overlaps.first, overlaps.second)
        store(out.attention, at, at, score * half.out.gamma)
        return carry[1], _Half(
            lower=overlap * half.read.gamma,
            ends=ends(half),
            read_total=half.read.total,
            read_lead=half.read.lead,
            out_total=half.out.total,
            out_lead=half.out.lead,
        )

    # a loop, for code that is run once waits for its instructions
    square, row = jnp.zeros((HALF, HALF), jnp.float32), jnp.zeros((HALF,), jnp.float32)
    none = _Half(square, Ends(row, row, *(jnp.float32(0),) * 3), row, row, row, row)
    half_1, half_2 = lax.fori_loop(0, 2, half_chunk, (none, none))
    end_1, end_2 = half_1.ends, half_2.ends

    read = after(half_2.read_total, half_2.read_lead, end_1)
    query = after(half_2.out_total, half_2.out_lead, end_1)
    store(out.gamma, second, first, read.gamma)
    store(out.attention, second, first, scores.corner * query.gamma)
    lower = Quarters(half_1.lower, overlaps.corner * read.gamma, half_2.lower)

    rows(layout.READ_S, (half_1.read_total, read.total), norm_p)
    rows(layout.READ_N, (half_1.read_lead, read.lead), norm_p)
    rows(layout.QUERY_S, (half_1.out_total, query.total), norm_q)
    rows(layout.QUERY_N, (half_1.out_lead, query.lead), norm_q)
    total, lead = end_2.total, end_2.lead  # of the second half, seen from the end
    rows(layout.WRITE_S, (total * end_1.gamma + lead * end_1.w, end_2.gamma), write)
    rows(layout.WRITE_N, (end_2.momentum * end_1.w, end_2.w), write)
    out.factors[layout.SIGHT_2, first] = half_2.read_total
    out.factors[layout.SIGHT_2, second] = half_2.read_lead
    out.factors[layout.ENDS_1, first], out.factors[layout.ENDS_1, second] = end_1.gamma, end_1.w
    keeps = {
        layout.KEEP_SS: total * end_1.total,
        layout.KEEP_NS: total * end_1.lead + lead * end_1.momentum,
        layout.KEEP_NN: end_2.momentum * end_1.momentum,
        layout.TOTAL_1: end_1.total,
        layout.LEAD_1: end_1.lead,
        layout.MOMENTUM_1: end_1.momentum,
        layout.MOMENTUM_2: end_2.momentum,
    }
    keep = jnp.zeros((CHUNK,), jnp.float32)
    for entry, value in keeps.items():
        keep = jnp.where(layout.lanes() == entry, value, keep)
    out.factors[layout.KEEP, :] = keep

    inverse = unit_lower_inverse(lower, coarse, float16=x.q.dtype != jnp.float32)
    store(out.inverse, first, first, inverse.first)
    store(out.inverse, second, first, inverse.corner)
    store(out.inverse, second, second, inverse.second)
    for ref in (out.gamma, out.attention, out.inverse):
        ref[first, second] = jnp.zeros((HALF, HALF), ref.dtype)


class Advanced(NamedTuple):
    """What the walk over the chunks gives.

    Attributes:
      error: `v'`, the error of every step before its write, `[B, T, HV, V]` in v's dtype.
      kept: the states entering each chunk, in v's dtype.
      final: the memory after the last step, float32.
    """

    error: Leaf
    kept: States
    final: Memory


def advance(x: Tokens, prepared: Prepared, memory: Memory | None, options: Options) -> Advanced:
    """The second kernel, sequential over chunks; no memory stands for zeros."""
    z = x.sizes
    block = options.tiles.advance_block_v
    specs = WalkSpecs(z, block)
    p = None if x.p is None else specs.keys(z.p_heads)
    values = specs.values()
    return kernel_call(
        partial(_advance, chunks=z.chunks, precision=exact(options.interpret)),
        (x.k, x.p, x.v, prepared.inverse, prepared.factors),
        memory,
        name="mdn_advance",
        grid=specs.grid,
        in_specs=[
            (specs.keys(z.heads), p, values, specs.matrix(), specs.factors()),
            None if memory is None else specs.memory(),
        ],
        out_specs=Advanced(values, specs.kept(), specs.memory()),
        out_shape=Advanced(z.per_head(z.value_dim, x.v.dtype), z.states(x.v.dtype), z.memory),
        warps=options.tiles.advance_warps,
        stages=options.tiles.advance_stages,
        interpret=options.interpret,
    )


def _advance(x, memory, out, *, chunks, precision):
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

    if memory is None:
        s = n = jnp.zeros(out.final.s.shape, jnp.float32)
    else:
        s, n = memory.s[...], -memory.m[...]
    s, n, *_ = lax.fori_loop(0, chunks, step, (s, n, *factors(jnp.int32(0))))
    out.final.s[...], out.final.m[...] = s, -n


def output(
    x: Tokens, prepared: Prepared, error: jax.Array, kept: States, options: Options
) -> jax.Array:
    """The third kernel: o `[B, T, HV, V]`, a block of V a program."""
    z = x.sizes
    block = options.tiles.output_block_v
    specs = ChunkSpecs(z, z.value_dim // block)
    values = specs.tokens(block, z.value_heads, blocked=True)
    return kernel_call(
        partial(_output, precision=exact(options.interpret)),
        x.q,
        error,
        prepared.attention,
        prepared.factors,
        kept,
        name="mdn_output",
        grid=specs.grid,
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
