"""Forward kernels with states: advance walks the chunks, output takes one chunk each."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import dot, kernel_call
from pallas_kernels.momentum_delta.block_specs import ChunkSpecs, WalkSpecs
from pallas_kernels.momentum_delta.fragments import Fragments, join, split
from pallas_kernels.momentum_delta.isolation import clean, keeps_nothing
from pallas_kernels.momentum_delta.isolation import times as times_exactly
from pallas_kernels.momentum_delta.launches import launches
from pallas_kernels.momentum_delta.rows import STATE_SCALARS, ChunkScalar, FactorRow
from pallas_kernels.momentum_delta.types import (
    CHUNK,
    Memory,
    Options,
    Prepared,
    States,
    Tokens,
    Values,
    WalkKeys,
)
from pallas_kernels.momentum_delta.units import (
    Bounds,
    columns,
    enter,
    leave,
    mixed,
    power_of_two,
    store_states,
)


class Advanced(NamedTuple):
    """What the walk over the chunks gives.

    Attributes:
      error: `v'`, the error of every step before its write, in the storage dtype.
      kept: the states entering each chunk, in the storage dtype.
      final: the memory after the last step, float32.
    """

    error: Values
    kept: States
    final: Memory


def advance(x: Tokens, prepared: Prepared, memory: Memory | None, options: Options) -> Advanced:
    """The second kernel, sequential over chunks, a block of V a program; no memory means zeros.

    In one launch, or in several that take the walks in halves and each add to the results of those
    before.
    """
    z = x.sizes
    block, storage = options.tiles.advance_block_v, options.numerics.storage
    from_zeros = memory is None
    done: Any = None
    for launch in launches(WalkSpecs(z, block).walks, options.tiles.advance_resident):
        specs = WalkSpecs(z, block, launch)
        p = None if x.p is None else specs.keys(z.p_heads)
        values, states, unit = specs.values(), specs.memory(), specs.units(storage)
        walked = Values(values, unit), specs.kept(storage)
        shapes = (
            Values(z.per_head(z.value_dim, storage), z.units(block, storage)),
            z.states(block, storage),
        )
        tokens = (prepared.walk_keys(x), x.v, prepared.mixing, prepared.factors)
        # what earlier launches wrote stays where it is: places of operands, to those of results
        after, results = len(jax.tree.leaves(tokens)), len(jax.tree.leaves(shapes))
        aliases = {}
        if launch is not None and memory is not None:
            aliases = {after: results, after + 1: results + 1}
        written = None
        if done is not None:
            written = done.error, done.kept
            aliases |= {after + 2 + i: i for i in range(results)}
        done = kernel_call(
            partial(
                _advance,
                specs=specs,
                warps=options.tiles.advance_warps,
                from_zeros=from_zeros,
                precision=options.numerics.products,
            ),
            tokens,
            memory,
            written,
            name="mdn_advance",
            grid=specs.grid,
            in_specs=[
                (WalkKeys(specs.keys(z.heads), p), values, specs.matrix(), specs.factors()),
                None if memory is None else states,
                None if written is None else walked,
            ],
            out_specs=Advanced(*walked, states),
            out_shape=Advanced(*shapes, z.memory),
            aliases=aliases,
            warps=options.tiles.advance_warps,
            stages=options.tiles.advance_stages,
            interpret=options.interpret,
        )
        memory = done.final
    result: Advanced = done
    return result


def _advance(tokens, memory, _, out, *, specs, warps, from_zeros, precision):
    (k_ref, p_ref), v_ref, mixing_ref, factor_ref = tokens
    dtype = out.error.data.dtype
    key_dim, block = out.final.s.shape
    values = Fragments(warps, block)
    first, end = specs.stretch()

    def step(
        c: jax.Array, carry: tuple[jax.Array, Bounds | None], *, carefully: bool = False
    ) -> tuple[jax.Array, Bounds | None]:
        # both states are one [K, 2 block] float32, operands of one product and results of one
        both, entering = carry
        start = c * CHUNK
        # the order is the measured one: with the states stored after a product a step takes longer
        keep_ss, keep_ns, keep_nn = (factor_ref[c, FactorRow.SCALARS, i] for i in STATE_SCALARS)
        v = values.load(v_ref, CHUNK, first=start).astype(jnp.float32)
        s, n = split(both)
        units = None if entering is None else entering.units
        store_states(out.kept, c, s, n, units, values)
        k = k_ref[pl.ds(start, CHUNK), :]
        p = k if p_ref is None else p_ref[pl.ds(start, CHUNK), :]

        def factor(row: int, by: jax.Array | None = None) -> jax.Array:
            factors = factor_ref[c, row, :]
            return (factors if by is None else factors * by)[:, None]

        starts = keeps_nothing(keep_ss, keep_ns, keep_nn) if carefully else None
        times: Callable[[Any, Any], Any] = times_exactly if carefully else operator.mul
        by_s = by_n = to_s = to_n = mixing_unit = None
        if units is not None:
            by_s, by_n = (unit.size for unit in units)
            if starts is not None:
                by_s, by_n = clean(by_s, starts), clean(by_n, starts)
            mixing_unit = factor_ref[c, FactorRow.SCALARS, ChunkScalar.INVERSE_SCALE]
        seen = dot(p, both.astype(dtype), precision)
        if starts is not None:
            seen = clean(seen, starts)
        seen_s, seen_n = split(seen)
        residual = v - factor(FactorRow.READ_S, by_s) * seen_s
        residual -= factor(FactorRow.READ_N, by_n) * seen_n
        error, in_unit = mixed(residual, mixing_ref[c], mixing_unit, precision)
        leaving = None
        if entering is None or in_unit is None:
            values.store(error, out.error.data, first=start)
        else:
            values.store(in_unit.tile, out.error.data, first=start)
            out.error.unit[c] = in_unit.unit
            reach_s, reach_n = (
                factor_ref[c, FactorRow.SCALARS, i] * in_unit.largest
                for i in (ChunkScalar.REACH_WRITE_S, ChunkScalar.REACH_WRITE_N)
            )
            leaving = Bounds(
                times(abs(keep_ss), entering.s) + times(abs(keep_ns), entering.n) + reach_s,
                times(abs(keep_nn), entering.n) + reach_n,
            )
            to_s, to_n = (unit.inverse for unit in leaving.units)
            # in this order nothing overflows
            keep_ss, keep_ns, keep_nn = (
                times(keep_ss, by_s) * to_s,
                times(keep_ns, by_n) * to_s,
                times(keep_nn, by_n) * to_n,
            )
        kept = join(keep_ss * s + keep_ns * n, keep_nn * n)
        if starts is not None:
            kept = clean(kept, starts)
        written = join(
            factor(FactorRow.WRITE_S, to_s) * error, factor(FactorRow.WRITE_N, to_n) * error
        )
        return kept + dot(k.T, written.astype(dtype), precision), leaving

    def walk(*, carefully: bool) -> tuple[jax.Array, Bounds | None]:
        if memory is None:
            s = n = jnp.zeros((key_dim, block), jnp.float32)
        else:
            s, n = values.load(memory.s, key_dim), -values.load(memory.m, key_dim)
            if from_zeros:  # what is there is of the first halves of walks
                s, n = (jnp.where(first == 0, 0.0, state) for state in (s, n))
        s, n, bounds = enter(s, n, dtype)
        entering = join(s, n), bounds
        if not carefully:
            return lax.fori_loop(first, end, step, entering)
        # (a loop that the compiler does not pipeline)
        _, result = lax.while_loop(
            lambda at: at[0] < end,
            lambda at: (at[0] + 1, step(at[0], at[1], carefully=True)),
            (jnp.int32(first), entering),
        )
        return result

    def finish(both: jax.Array, bounds: Bounds | None) -> None:
        s, n = leave(*split(both), bounds)
        values.store(s, out.final.s)
        values.store(-n, out.final.m)

    done = walk(carefully=False)
    # what is not finite stays so until the end, by then in other documents as well: once more, with
    # care, but not at the cost of every walk
    finite = jnp.sum(done[0]) * 0.0 == 0.0
    pl.when(finite)(lambda: finish(*done))
    pl.when(jnp.logical_not(finite))(lambda: finish(*walk(carefully=True)))


def output(
    x: Tokens, prepared: Prepared, error: Values, kept: States, options: Options
) -> jax.Array:
    """The third kernel: o `[B, T, HV, V]`, a block of V a program."""
    z = x.sizes
    block = options.tiles.output_block_v
    specs = ChunkSpecs(z, z.value_dim // block)
    values = specs.tokens(block, z.value_heads, blocked=True)
    return kernel_call(
        partial(_output, options=options, block_of=specs.block, value_dim=z.value_dim),
        x.q,
        error,
        prepared.attention,
        prepared.factors,
        kept,
        name="mdn_output",
        grid=specs.grid,
        in_specs=[
            specs.tokens(z.key_dim, z.heads),
            Values(values, specs.units(error.unit)),
            specs.matrix(),
            specs.factors(),
            specs.states(kept, z.key_dim, block, cut="v"),
        ],
        out_specs=values,
        out_shape=z.per_head(z.value_dim, x.v.dtype),
        warps=options.tiles.output_warps,
        stages=1,
        interpret=options.interpret,
    )


def _output(q, error, attention, factors, kept, out, *, options, block_of, value_dim):
    precision = options.numerics.products
    queries, errors, matrix = q[...], error.data[...], attention[...]
    query_s, query_n = (factors[i, :][:, None] for i in (FactorRow.QUERY_S, FactorRow.QUERY_N))
    if kept.unit is not None:
        # queries become float16, each about 1 long or with its largest element near 1; errors what
        # q was
        if options.normalize:
            lengths = (options.scale / factors[FactorRow.NORM_Q, :])[:, None]
        else:
            lengths = jnp.max(jnp.abs(queries.astype(jnp.float32)), axis=1)[:, None]
        power = power_of_two(lengths)
        queries = (queries.astype(jnp.float32) * power.inverse).astype(kept.s.dtype)
        query_s, query_n = query_s * power.size, query_n * power.size
        first, count = block_of(pl.program_id(0)) * out.shape[1], out.shape[1]
        of_states = columns(kept.unit, value_dim, first, count)[None, :]
        of_errors = columns(error.unit, value_dim, first, count)[None, :]
        errors = (errors.astype(jnp.float32) * of_errors).astype(matrix.dtype)
    o = query_s * dot(queries, kept.s[...], precision)
    o += query_n * dot(queries, kept.n[...], precision)
    if kept.unit is not None:
        o *= of_states
    # a state that is not finite has no part in documents that it does not reach
    o = jnp.where((query_s == 0) & (query_n == 0), 0.0, o) + dot(matrix, errors, precision)
    out[...] = o.astype(out.dtype)
