"""Backward kernels with states: retreat walks the chunks back, state_gradients takes one each.

Gradients are with respect to `N = -M`. Formulas: docs/algorithm.md, section 5.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import dot, kernel_call
from pallas_kernels.momentum_delta.block_specs import ChunkSpecs, WalkSpecs
from pallas_kernels.momentum_delta.coefficients import lanes
from pallas_kernels.momentum_delta.fragments import Fragments, join, split
from pallas_kernels.momentum_delta.isolation import clean, finite, keeps_nothing, times, unless
from pallas_kernels.momentum_delta.launches import launches
from pallas_kernels.momentum_delta.rows import (
    GRADIENT_ROWS,
    STATE_ROWS,
    STATE_SCALARS,
    ChunkScalar,
    FactorRow,
)
from pallas_kernels.momentum_delta.types import (
    CHUNK,
    Leaf,
    Memory,
    Options,
    Prepared,
    States,
    Tokens,
    Values,
)
from pallas_kernels.momentum_delta.units import (
    KEEP,
    QUERY,
    READ,
    WRITE,
    Bounds,
    Sums,
    enter,
    largest,
    leave,
    mixed,
    most,
    store_states,
    stored,
    unit_of,
)


class Local(NamedTuple):
    """What a chunk's outputs give.

    Attributes:
      d_error: gradient of the error from them alone, in the storage dtype.
      of_outputs: unit that float16 needs for the gradients of outputs, `[B, HV, NT, blocks of V]`;
        None where nothing is in float16.
    """

    d_error: Values
    of_outputs: Leaf | None


class Retreated(NamedTuple):
    """What the walk back over the chunks gives.

    Attributes:
      d_v: gradient of v, in the storage dtype.
      d_kept: gradients of the states leaving each chunk, in the storage dtype.
      d_memory: gradient of the initial memory, float32.
    """

    d_v: Values
    d_kept: States
    d_memory: Memory


def local_gradient(x: Tokens, prepared: Prepared, d_o: jax.Array, options: Options) -> Local:
    """The fourth kernel: the gradient of the error from its own chunk's outputs, `A^T dO`.

    A program takes a block of V. It keeps a matrix a chunk out of the walk back, which is short of
    shared memory.
    """
    z = x.sizes
    block = options.tiles.output_block_v
    specs = ChunkSpecs(z, z.value_dim // block)
    values = specs.tokens(block, z.value_heads, blocked=True)
    storage = options.numerics.storage
    unit = z.units(block, storage)
    unit_spec = None if unit is None else specs.unit()
    return kernel_call(
        partial(_local_gradient, precision=options.numerics.products),
        prepared.attention,
        d_o,
        name="mdn_local_gradient",
        grid=specs.grid,
        in_specs=[specs.matrix(), values],
        out_specs=Local(Values(values, unit_spec), unit_spec),
        out_shape=Local(Values(z.per_head(z.value_dim, storage), unit), unit),
        warps=options.tiles.output_warps,
        stages=1,
        interpret=options.interpret,
    )


def _local_gradient(attention, d_o_ref, out, *, precision):
    d_o = d_o_ref[...]
    d_error = dot(attention[...].T, d_o, precision)
    if out.of_outputs is None:
        out.d_error.data[...] = d_error.astype(out.d_error.data.dtype)
    else:
        out.of_outputs[0] = unit_of(largest(d_o.astype(jnp.float32))).size
        out.d_error.data[...], out.d_error.unit[0], _ = stored(d_error)


def retreat(
    x: Tokens,
    prepared: Prepared,
    d_o: jax.Array,
    local: Local,
    d_final: Memory,
    options: Options,
    *,
    in_place: bool = True,
) -> Retreated:
    """The fifth kernel, sequential over chunks from the last, a block of V a program.

    In one launch, or in several that take the walks in halves and each add to the results of those
    before. `d_v` takes the memory of `local.d_error`, if `in_place`: a tile is read before it is
    written.
    """
    z = x.sizes
    block, storage = options.tiles.retreat_block_v, options.numerics.storage
    done: Any = None
    d_error, walk_keys = local.d_error.data, prepared.walk_keys(x)
    for launch in launches(WalkSpecs(z, block).walks, options.tiles.retreat_resident):
        specs = WalkSpecs(z, block, launch)
        keys, values, memory = specs.keys(z.heads), specs.values(), specs.memory()
        p = None if x.p is None else specs.keys(z.p_heads)
        units = local.of_outputs, local.d_error.unit
        tokens = (x.q, *walk_keys, d_o, units, d_error)
        d_v = Values(values, specs.units(storage))
        shapes = (
            Values(z.per_head(z.value_dim, storage), z.units(block, storage)),
            z.states(block, storage),
        )
        # what earlier launches wrote stays where it is: places of operands, to those of results
        after, results = len(jax.tree.leaves(tokens)), len(jax.tree.leaves(shapes))
        aliases = {after - 1: 0} if in_place else {}
        if launch is not None:
            aliases |= {after: results, after + 1: results + 1}
        written = written_specs = None
        if done is not None:
            again = done.d_v._replace(data=None) if in_place else done.d_v
            written = again, done.d_kept
            written_specs = d_v._replace(data=None) if in_place else d_v, specs.kept(storage)
            aliases |= {after + 2 + i: i + in_place for i in range(results - in_place)}
        done = kernel_call(
            partial(
                _retreat,
                specs=specs,
                warps=options.tiles.retreat_warps,
                storage=storage,
                precision=options.numerics.products,
            ),
            tokens,
            d_final,
            written,
            (prepared.mixing, prepared.factors),
            name="mdn_retreat",
            grid=specs.grid,
            in_specs=[
                (keys, keys, p, values, tuple(map(specs.units_of, units)), values),
                memory,
                written_specs,
                (specs.matrix(), specs.factors()),
            ],
            out_specs=Retreated(d_v, specs.kept(storage), memory),
            out_shape=Retreated(*shapes, z.memory),
            aliases=aliases,
            warps=options.tiles.retreat_warps,
            stages=options.tiles.retreat_stages,
            interpret=options.interpret,
        )
        d_error, d_final = (done.d_v.data if in_place else d_error), done.d_memory
    result: Retreated = done
    return result


def _retreat(tokens, d_final, _, prepared, out, *, specs, warps, storage, precision):
    q_ref, k_ref, p_ref, do_ref, (output_unit, local_unit), local_ref = tokens
    mixing_ref, factor_ref = prepared
    key_dim, block = d_final.s.shape
    values = Fragments(warps, block)
    first, end = specs.stretch(back=True)

    def ahead(c: jax.Array) -> tuple[jax.Array, ...]:
        return (
            values.load(local_ref, CHUNK, first=c * CHUNK),
            *(factor_ref[c, row, :] for row in STATE_ROWS),
            *(factor_ref[c, FactorRow.SCALARS, i] for i in STATE_SCALARS),
        )

    def step(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        # both gradients are one [K, 2 block] float32; rows and d_local were loaded a step ahead
        d_both, leaving, d_local, *rows, keep_ss, keep_ns, keep_nn = carry
        read_s, read_n, write_s, write_n, query_s, query_n = (row[:, None] for row in rows)
        starts = keeps_nothing(keep_ss, keep_ns, keep_nn)
        c = end - 1 - i
        start = c * CHUNK
        following = ahead(jnp.maximum(c - 1, 0))
        d_s, d_n = split(d_both)
        units = None if leaving is None else leaving.units
        store_states(out.d_kept, c, d_s, d_n, units, values)
        d_both = unless(starts, d_both, finite)
        d_s, d_n = split(d_both)
        steps = pl.ds(start, CHUNK)
        k, q = k_ref[steps, :], q_ref[steps, :]
        p = k if p_ref is None else p_ref[steps, :]
        d_o = values.load(do_ref, CHUNK, first=start).astype(jnp.float32)
        mixing_unit = None
        if units is not None:
            mixing_unit = factor_ref[c, FactorRow.SCALARS, ChunkScalar.INVERSE_SCALE]
            unit_s, unit_n = (clean(unit.size, starts) for unit in units)
            write_s, write_n = write_s * unit_s, write_n * unit_n

        by_s, by_n = split(dot(k, d_both.astype(storage), precision))
        # what is loaded as values keeps the sum in their layout, of two numbers of a row a thread
        d_error = d_local.astype(jnp.float32)
        if leaving is not None:
            d_error *= local_unit[c]
        d_error = d_error + write_s * by_s + write_n * by_n
        d_v, in_unit = mixed(d_error, mixing_ref[c].T, mixing_unit, precision)
        entering = None
        if leaving is None or in_unit is None:
            values.store(d_v, out.d_v.data, first=start)
        else:
            values.store(in_unit.tile, out.d_v.data, first=start)
            out.d_v.unit[c] = in_unit.unit
            outputs = most(output_unit[c])
            reach_s, reach_n = (
                factor_ref[c, FactorRow.SCALARS, by_query] * outputs
                + factor_ref[c, FactorRow.SCALARS, by_read] * in_unit.largest
                for by_query, by_read in (
                    (ChunkScalar.REACH_QUERY_S, ChunkScalar.REACH_READ_S),
                    (ChunkScalar.REACH_QUERY_N, ChunkScalar.REACH_READ_N),
                )
            )
            entering = Bounds(
                times(abs(keep_ss), leaving.s) + reach_s,
                times(abs(keep_ns), leaving.s) + times(abs(keep_nn), leaving.n) + reach_n,
            )
            to_s, to_n = (unit.inverse for unit in entering.units)
            # in this order nothing overflows
            keep_ss, keep_ns, keep_nn = (
                times(keep_ss, unit_s) * to_s,
                times(keep_ns, unit_s) * to_n,
                times(keep_nn, unit_n) * to_n,
            )
            read_s, read_n = read_s * to_s, read_n * to_n
            query_s, query_n = query_s * to_s, query_n * to_n

        d_both = join(keep_ss * d_s, keep_ns * d_s + keep_nn * d_n)
        # both products accumulate onto what is kept
        by_query = join(query_s * d_o, query_n * d_o).astype(
            storage if leaving is None else q.dtype
        )
        d_both += dot(q.T, by_query, precision)
        by_read = join(-read_s * d_v, -read_n * d_v).astype(storage)
        d_both += dot(p.T, by_read, precision)
        return d_both, entering, *following

    d_s, d_n = values.load(d_final.s, key_dim), -values.load(d_final.m, key_dim)
    d_s, d_n, bounds = enter(d_s, d_n, storage)
    carry = join(d_s, d_n), bounds, *ahead(jnp.int32(end - 1))
    d_both, bounds, *_ = lax.fori_loop(0, end - first, step, carry)
    d_s, d_n = leave(*split(d_both), bounds)
    values.store(d_s, out.d_memory.s)
    values.store(-d_n, out.d_memory.m)


class KeyGradients(NamedTuple):
    """Gradients of queries, keys and (if given) erase keys per value head, `[B, T, HV, K]`."""

    q: Leaf
    k: Leaf
    p: Leaf | None


class FromStates(NamedTuple):
    """What a chunk's entering and leaving states give.

    Attributes:
      keys: gradients as if the norms were constants, in q's dtype.
      rows: gradients of the row factors and of KEEP, one part a block of K,
        `[B, HV, NT, K / block, ROW_GRADIENTS, C]` float32.
    """

    keys: KeyGradients
    rows: Leaf


def state_gradients(
    x: Tokens,
    prepared: Prepared,
    values: tuple[Values, Values, Values],
    kept: States,
    d_kept: States,
    units: Sums | None,
    options: Options,
) -> FromStates:
    """The sixth kernel: gradients by way of the states, a block of K a program.

    Args:
      x: the call's tokens.
      prepared: from the forward pass.
      values: `d_o` (itself in its own dtype), `d_v` and `error`.
      kept: states entering each chunk.
      d_kept: gradients of the states leaving each chunk.
      units: from `units.sums_with_states`; None for float32.
      options: of the call.
    """
    z = x.sizes
    block = min(options.tiles.states_block_k, z.key_dim)
    blocks = z.key_dim // block
    specs = ChunkSpecs(z, blocks)
    keys = specs.tokens(block, z.heads, blocked=True)
    p = None if x.p is None else specs.tokens(block, z.p_heads, blocked=True)
    per_head, gradient = (
        specs.tokens(block, z.value_heads, blocked=True),
        z.per_head(z.key_dim, x.q.dtype),
    )
    rows = z.per_chunk(blocks, GRADIENT_ROWS, CHUNK, dtype=jnp.float32)
    return kernel_call(
        partial(
            _state_gradients,
            value_dim=z.value_dim,
            block_v=min(options.tiles.states_block_v, z.value_dim),
            warps=options.tiles.states_warps,
            precision=options.numerics.products,
        ),
        (x.q, x.k, x.p),
        values,
        kept,
        d_kept,
        units,
        prepared.factors,
        name="mdn_state_gradients",
        grid=specs.grid,
        in_specs=[
            (keys, keys, p),
            tuple(specs.values(x) for x in values),
            specs.states(kept, block, z.value_dim, cut="k"),
            specs.states(d_kept, block, z.value_dim, cut="k"),
            specs.units(units),
            specs.factors(),
        ],
        out_specs=FromStates(
            KeyGradients(per_head, per_head, None if p is None else per_head), specs.part()
        ),
        out_shape=FromStates(
            KeyGradients(gradient, gradient, None if p is None else gradient), rows
        ),
        warps=options.tiles.states_warps,
        stages=options.tiles.states_stages,
        interpret=options.interpret,
    )


def _state_gradients(
    tokens, values, kept, d_kept, units, factors, out, *, value_dim, block_v, warps, precision
):
    q_ref, k_ref, p_ref = tokens
    do_ref, dv_ref, error_ref = (x.data for x in values)
    dtype = q_ref.dtype
    key_dim = q_ref.shape[1]
    keys = Fragments(warps, key_dim)
    order = keys.order()  # of the rows of states, so that products have the columns of keys

    def load_keys() -> tuple[jax.Array, ...]:
        q, k = keys.load(q_ref, CHUNK), keys.load(k_ref, CHUNK)
        return q, k, k if p_ref is None else keys.load(p_ref, CHUNK)

    # after the loop they would stall; float32 leaves no registers to have them before
    early = load_keys() if kept.s.dtype.itemsize == 2 else None
    threads = min(key_dim, warps * 32 * 8 // block_v), block_v // 8  # with 8 numbers of a row each

    def within_threads(tile: jax.Array) -> jax.Array:
        """Sums of what each thread has of a tile of states: nothing is exchanged."""
        return jnp.sum(jnp.sum(tile.reshape(-1, *threads, 8), axis=3), axis=0)

    def step(i: jax.Array, carry):
        at = pl.ds(i * block_v, block_v)
        d_o, d_v, error = do_ref[:, at], dv_ref[:, at], error_ref[:, at]
        s, n = kept.s[order, at], kept.n[order, at]
        d_s, d_n = d_kept.s[order, at], d_kept.n[order, at]
        products, keeps = carry
        by_read, by_write, by_query = (s, n), (d_s, d_n), (s, n)
        if units is not None:
            to_read, to_write, to_query, to_keep = (
                units.columns[row, at][None, :] for row in (READ, WRITE, QUERY, KEEP)
            )
            by_read = tuple(y * to_read.astype(s.dtype) for y in by_read)
            by_write = tuple(y * to_write.astype(s.dtype) for y in by_write)
        s, n, d_s, d_n = (y.astype(jnp.float32) for y in (s, n, d_s, d_n))
        if units is not None:
            # of what d_o multiplies bfloat16's digits are enough
            by_query = tuple((y * to_query).astype(d_o.dtype) for y in (s, n))
            d_s, d_n = (y * to_keep for y in (d_s, d_n))
        # in the order of the factors
        rows = (d_v, d_v, error, error, d_o, d_o)
        states = (*by_read, *by_write, *by_query)
        products = tuple(
            total + dot(row, state.T, precision)
            for total, row, state in zip(products, rows, states, strict=True)
        )
        inner = (d_s * s, d_s * n, d_n * n)  # in the order of KEEP
        keeps = tuple(
            total + within_threads(part) for total, part in zip(keeps, inner, strict=True)
        )
        return products, keeps

    square = jnp.zeros(q_ref.shape, jnp.float32)
    carry = ((square,) * 6, (jnp.zeros(threads, jnp.float32),) * 3)
    products, keeps = lax.fori_loop(0, value_dim // block_v, step, carry)
    # all loads before the first is used: one wait
    row_factors = [factors[row, :] for row in STATE_ROWS]
    if units is not None:
        power_k, power_p = factors[FactorRow.POWER_K, :], factors[FactorRow.POWER_P, :]
        for row, power in enumerate((power_p, power_p, power_k, power_k)):
            row_factors[row] *= power
    q, k, p = early or load_keys()

    keep = jnp.zeros((CHUNK,), jnp.float32)
    for place, gradient in zip(STATE_SCALARS, keeps, strict=True):
        keep = jnp.where(lanes() == int(place), jnp.sum(gradient), keep)
    if units is not None:
        keep *= units.unit[KEEP]
    three = (factors[FactorRow.SCALARS, i] for i in STATE_SCALARS)
    out.rows[FactorRow.SCALARS, :] = clean(keep, keeps_nothing(*three))

    def through(rows: tuple[int, int], tile: jax.Array, sign: float = 1.0) -> jax.Array:
        """Gradient of the keys whose products the two rows of factors scale."""
        by = sign if units is None else sign * units.unit[rows[0] // 2]
        wide = tile.astype(jnp.float32)
        dead = (row_factors[rows[0]] == 0) & (row_factors[rows[1]] == 0)
        for row in rows:
            out.rows[row, :] = clean(jnp.sum(products[row] * wide, axis=1) * by, dead)
        both = [(row_factors[row] * by)[:, None] * products[row] for row in rows]
        return clean(both[0] + both[1], dead[:, None])

    # one pair of products is done with before the next: registers are short
    d_q = through((FactorRow.QUERY_S, FactorRow.QUERY_N), q)
    keys.store(d_q.astype(dtype), out.keys.q)
    d_k = through((FactorRow.WRITE_S, FactorRow.WRITE_N), k)
    d_p = through((FactorRow.READ_S, FactorRow.READ_N), p, sign=-1.0)
    if p_ref is None:
        d_k += d_p
    else:
        keys.store(d_p.astype(dtype), out.keys.p)
    keys.store(d_k.astype(dtype), out.keys.k)
