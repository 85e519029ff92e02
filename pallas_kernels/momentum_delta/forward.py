"""Forward kernels: advance walks the chunks, prepare and output take one chunk each."""

from functools import partial
from typing import Any, NamedTuple

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
from pallas_kernels.momentum_delta.fragments import Fragments, join, split
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
    launches,
)


def prepare(x: Tokens, options: Options) -> Prepared:
    """The first kernel: all of a chunk that needs no state."""
    z = x.sizes
    specs = ChunkSpecs(z)
    keys, gate = specs.tokens(z.key_dim, z.heads), specs.gate()
    p = None if x.p is None else specs.tokens(z.key_dim, z.p_heads)
    matrix = z.per_chunk(CHUNK, CHUNK, dtype=options.storage(x.q.dtype))
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
    coarse = coefficient_precision(options.storage(x.q.dtype), options.interpret)
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

    inverse = unit_lower_inverse(lower, coarse, float16=options.storage(x.q.dtype) != jnp.float32)
    row, column = layout.iotas(HALF)
    store(out.mixing, first, first, jnp.where(row > column, inverse.first, 0.0))
    store(out.mixing, second, first, inverse.corner)
    store(out.mixing, second, second, jnp.where(row > column, inverse.second, 0.0))
    for ref in (out.gamma, out.attention, out.mixing):
        ref[first, second] = jnp.zeros((HALF, HALF), ref.dtype)


class Advanced(NamedTuple):
    """What the walk over the chunks gives.

    Attributes:
      error: `v'`, the error of every step before its write, `[B, T, HV, V]` in the storage dtype.
      kept: the states entering each chunk, in the storage dtype.
      final: the memory after the last step, float32.
    """

    error: Leaf
    kept: States
    final: Memory


def advance(x: Tokens, prepared: Prepared, memory: Memory | None, options: Options) -> Advanced:
    """The second kernel, sequential over chunks, a block of V a program; no memory means zeros.

    In one launch, or in several that take the walks in halves and each add to the results of those
    before.
    """
    z = x.sizes
    block, storage = options.tiles.advance_block_v, options.storage(x.q.dtype)
    from_zeros = memory is None
    done: Any = None
    for launch in launches(WalkSpecs(z, block).walks, options.tiles.advance_resident):
        specs = WalkSpecs(z, block, launch)
        p = None if x.p is None else specs.keys(z.p_heads)
        values, states = specs.values(), specs.memory()
        tokens = (x.k, x.p, x.v, prepared.mixing, prepared.factors)
        # what earlier launches wrote stays where it is: places of operands, to those of results
        after = len(jax.tree.leaves(tokens))
        aliases = {}
        if launch is not None and memory is not None:
            aliases = {after: 3, after + 1: 4}
        written = written_specs = None
        if done is not None:
            written, written_specs = (done.error, done.kept), (values, specs.kept())
            aliases |= {after + 2 + i: i for i in range(3)}
        done = kernel_call(
            partial(
                _advance,
                specs=specs,
                warps=options.tiles.advance_warps,
                from_zeros=from_zeros,
                precision=options.products,
            ),
            tokens,
            memory,
            written,
            name="mdn_advance",
            grid=specs.grid,
            in_specs=[
                (specs.keys(z.heads), p, values, specs.matrix(), specs.factors()),
                None if memory is None else states,
                written_specs,
            ],
            out_specs=Advanced(values, specs.kept(), states),
            out_shape=Advanced(z.per_head(z.value_dim, storage), z.states(storage), z.memory),
            aliases=aliases,
            warps=options.tiles.advance_warps,
            stages=options.tiles.advance_stages,
            interpret=options.interpret,
        )
        memory = done.final
    result: Advanced = done
    return result


def _advance(tokens, memory, _, out, *, specs, warps, from_zeros, precision):
    k_ref, p_ref, v_ref, mixing_ref, factor_ref = tokens
    dtype = out.error.dtype
    key_dim, block = out.final.s.shape
    values = Fragments(warps, block)
    first, end = specs.stretch()

    def step(c: jax.Array, both: jax.Array) -> jax.Array:
        # both states are one [K, 2 block] float32, operands of one product and results of one
        start = c * CHUNK
        # the order is the measured one: with the states stored after a product a step takes longer
        keep_ss, keep_ns, keep_nn = (
            factor_ref[c, layout.KEEP, i] for i in (layout.KEEP_SS, layout.KEEP_NS, layout.KEEP_NN)
        )
        v = values.load(v_ref, CHUNK, first=start).astype(jnp.float32)
        low = both.astype(dtype)
        for state, ref in zip(split(low), out.kept, strict=True):
            values.store(state, ref, c)
        k = k_ref[pl.ds(start, CHUNK), :]
        p = k if p_ref is None else p_ref[pl.ds(start, CHUNK), :]

        def factor(row: int) -> jax.Array:
            return factor_ref[c, row, :][:, None]

        seen_s, seen_n = split(dot(p, low, precision))
        residual = v - factor(layout.READ_S) * seen_s - factor(layout.READ_N) * seen_n
        # a step's own residual is not rounded
        error = residual + dot(mixing_ref[c], residual.astype(dtype), precision)
        values.store(error.astype(dtype), out.error, first=start)
        s, n = split(both)
        kept = join(keep_ss * s + keep_ns * n, keep_nn * n)
        written = join(factor(layout.WRITE_S) * error, factor(layout.WRITE_N) * error)
        return kept + dot(k.T, written.astype(dtype), precision)

    if memory is None:
        s = n = jnp.zeros((key_dim, block), jnp.float32)
    else:
        s, n = values.load(memory.s, key_dim), -values.load(memory.m, key_dim)
        if from_zeros:  # what is there is of the first halves of walks
            s, n = (jnp.where(first == 0, 0.0, state) for state in (s, n))
    s, n = split(lax.fori_loop(first, end, step, join(s, n)))
    values.store(s, out.final.s)
    values.store(-n, out.final.m)


def output(
    x: Tokens, prepared: Prepared, error: jax.Array, kept: States, options: Options
) -> jax.Array:
    """The third kernel: o `[B, T, HV, V]`, a block of V a program."""
    z = x.sizes
    block = options.tiles.output_block_v
    specs = ChunkSpecs(z, z.value_dim // block)
    values = specs.tokens(block, z.value_heads, blocked=True)
    return kernel_call(
        partial(_output, precision=options.products),
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
