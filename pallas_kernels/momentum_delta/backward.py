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
from pallas_kernels.momentum_delta import layout
from pallas_kernels.momentum_delta.fragments import Fragments, join, split
from pallas_kernels.momentum_delta.layout import (
    CHUNK,
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


class Retreated(NamedTuple):
    """What the walk back over the chunks gives.

    Attributes:
      d_v: gradient of v, `[B, T, HV, V]` in the storage dtype.
      d_kept: gradients of the states leaving each chunk, in the storage dtype.
      d_memory: gradient of the initial memory, float32.
    """

    d_v: Leaf
    d_kept: States
    d_memory: Memory


def local_gradient(x: Tokens, prepared: Prepared, d_o: jax.Array, options: Options) -> jax.Array:
    """The fourth kernel: the gradient of the error from its own chunk's outputs, `A^T dO`.

    A program takes a block of V. It keeps a matrix a chunk out of the walk back, which is short of
    shared memory.
    """
    z = x.sizes
    block = options.tiles.output_block_v
    specs = ChunkSpecs(z, z.value_dim // block)
    values = specs.tokens(block, z.value_heads, blocked=True)
    return kernel_call(
        partial(_local_gradient, precision=options.products),
        prepared.attention,
        d_o,
        name="mdn_local_gradient",
        grid=specs.grid,
        in_specs=[specs.matrix(), values],
        out_specs=values,
        out_shape=z.per_head(z.value_dim, options.storage(x.q.dtype)),
        warps=options.tiles.output_warps,
        stages=1,
        interpret=options.interpret,
    )


def _local_gradient(attention, d_o, out, *, precision):
    out[...] = dot(attention[...].T, d_o[...], precision).astype(out.dtype)


def retreat(
    x: Tokens,
    prepared: Prepared,
    d_o: jax.Array,
    d_local: jax.Array,
    d_final: Memory,
    options: Options,
    *,
    in_place: bool = True,
) -> Retreated:
    """The fifth kernel, sequential over chunks from the last, a block of V a program.

    In one launch, or in several that take the walks in halves and each add to the results of those
    before. `d_v` takes the memory of `d_local`, if `in_place`: a tile is read before it is written.
    """
    z = x.sizes
    block, storage = options.tiles.retreat_block_v, options.storage(x.q.dtype)
    done: Any = None
    for launch in launches(WalkSpecs(z, block).walks, options.tiles.retreat_resident):
        specs = WalkSpecs(z, block, launch)
        keys, values, memory = specs.keys(z.heads), specs.values(), specs.memory()
        p = None if x.p is None else specs.keys(z.p_heads)
        tokens = (x.q, x.k, x.p, d_o, d_local)
        # what earlier launches wrote stays where it is: places of operands, to those of results
        after = len(jax.tree.leaves(tokens))
        aliases = {after - 1: 0} if in_place else {}
        if launch is not None:
            aliases |= {after: 3, after + 1: 4}
        if done is None:
            written = written_specs = None
        else:
            written = (None if in_place else done.d_v, done.d_kept)
            written_specs = (None if in_place else values, specs.kept())
            results = (1, 2) if in_place else (0, 1, 2)
            aliases |= {after + 2 + i: result for i, result in enumerate(results)}
        done = kernel_call(
            partial(
                _retreat,
                specs=specs,
                warps=options.tiles.retreat_warps,
                precision=options.products,
            ),
            tokens,
            d_final,
            written,
            (prepared.mixing, prepared.factors),
            name="mdn_retreat",
            grid=specs.grid,
            in_specs=[
                (keys, keys, p, values, values),
                memory,
                written_specs,
                (specs.matrix(), specs.factors()),
            ],
            out_specs=Retreated(values, specs.kept(), memory),
            out_shape=Retreated(z.per_head(z.value_dim, storage), z.states(storage), z.memory),
            aliases=aliases,
            warps=options.tiles.retreat_warps,
            stages=options.tiles.retreat_stages,
            interpret=options.interpret,
        )
        d_local, d_final = (done.d_v if in_place else d_local), done.d_memory
    result: Retreated = done
    return result


def _retreat(tokens, d_final, _, prepared, out, *, specs, warps, precision):
    q_ref, k_ref, p_ref, do_ref, local_ref = tokens
    mixing_ref, factor_ref = prepared
    dtype = out.d_v.dtype
    key_dim, block = d_final.s.shape
    values = Fragments(warps, block)
    first, end = specs.stretch(back=True)

    def ahead(c: jax.Array) -> tuple[jax.Array, ...]:
        keeps = (layout.KEEP_SS, layout.KEEP_NS, layout.KEEP_NN)
        return (
            values.load(local_ref, CHUNK, first=c * CHUNK),
            *(factor_ref[c, row, :] for row in range(layout.QUERY_N + 1)),
            *(factor_ref[c, layout.KEEP, i] for i in keeps),
        )

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # both gradients are one [K, 2 block] float32; rows and d_local were loaded a step ahead
        d_both, d_local, *rows, keep_ss, keep_ns, keep_nn = carry
        read_s, read_n, write_s, write_n, query_s, query_n = (row[:, None] for row in rows)
        c = end - 1 - i
        start = c * CHUNK
        following = ahead(jnp.maximum(c - 1, 0))
        low = d_both.astype(dtype)
        for state, ref in zip(split(low), out.d_kept, strict=True):
            values.store(state, ref, c)
        steps = pl.ds(start, CHUNK)
        k, q = k_ref[steps, :], q_ref[steps, :]
        p = k if p_ref is None else p_ref[steps, :]
        d_o = values.load(do_ref, CHUNK, first=start).astype(jnp.float32)

        by_s, by_n = split(dot(k, low, precision))
        # what is loaded as values keeps the sum in their layout, of two numbers of a row a thread
        d_error = d_local.astype(jnp.float32) + write_s * by_s + write_n * by_n
        d_v = d_error + dot(mixing_ref[c].T, d_error.astype(dtype), precision)
        values.store(d_v.astype(dtype), out.d_v, first=start)

        d_s, d_n = split(d_both)
        d_both = join(keep_ss * d_s, keep_ns * d_s + keep_nn * d_n)
        # both products accumulate onto what is kept
        by_query = join(query_s * d_o, query_n * d_o).astype(dtype)
        d_both += dot(q.T, by_query, precision)
        by_read = join(-read_s * d_v, -read_n * d_v).astype(dtype)
        d_both += dot(p.T, by_read, precision)
        return d_both, *following

    d_s, d_n = values.load(d_final.s, key_dim), -values.load(d_final.m, key_dim)
    carry = (join(d_s, d_n), *ahead(jnp.int32(end - 1)))
    d_both, *_ = lax.fori_loop(0, end - first, step, carry)
    d_s, d_n = split(d_both)
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
    values: tuple[jax.Array, jax.Array, jax.Array],
    kept: States,
    d_kept: States,
    options: Options,
) -> FromStates:
    """The sixth kernel: gradients by way of the states, a block of K a program.

    Args:
      x: the call's tokens.
      prepared: from the forward pass.
      values: `d_o`, `d_v` and `error`, `[B, T, HV, V]`.
      kept: states entering each chunk.
      d_kept: gradients of the states leaving each chunk.
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
    states = specs.states(block, z.value_dim, cut="k")
    rows = z.per_chunk(blocks, layout.ROW_GRADIENTS, CHUNK, dtype=jnp.float32)
    return kernel_call(
        partial(
            _state_gradients,
            value_dim=z.value_dim,
            block_v=min(options.tiles.states_block_v, z.value_dim),
            warps=options.tiles.states_warps,
            precision=options.products,
        ),
        (x.q, x.k, x.p),
        values,
        kept,
        d_kept,
        prepared.factors,
        name="mdn_state_gradients",
        grid=specs.grid,
        in_specs=[
            (keys, keys, p),
            (specs.tokens(z.value_dim, z.value_heads),) * 3,
            states,
            states,
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
    tokens, values, kept, d_kept, factors, out, *, value_dim, block_v, warps, precision
):
    q_ref, k_ref, p_ref = tokens
    do_ref, dv_ref, error_ref = values
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
        columns = pl.ds(i * block_v, block_v)
        d_o, d_v, error = do_ref[:, columns], dv_ref[:, columns], error_ref[:, columns]
        s, n = kept.s[order, columns], kept.n[order, columns]
        d_s, d_n = d_kept.s[order, columns], d_kept.n[order, columns]
        products, keeps = carry
        # in the order of the factors: READ_S, READ_N, WRITE_S, WRITE_N, QUERY_S, QUERY_N
        pairs = ((d_v, s), (d_v, n), (error, d_s), (error, d_n), (d_o, s), (d_o, n))
        products = tuple(
            total + dot(rows, state.T, precision)
            for total, (rows, state) in zip(products, pairs, strict=True)
        )
        s, n, d_s, d_n = (y.astype(jnp.float32) for y in (s, n, d_s, d_n))
        inner = (d_s * s, d_s * n, d_n * n)  # in the order of KEEP
        keeps = tuple(
            total + within_threads(part) for total, part in zip(keeps, inner, strict=True)
        )
        return products, keeps

    square = jnp.zeros(q_ref.shape, jnp.float32)
    carry = ((square,) * 6, (jnp.zeros(threads, jnp.float32),) * 3)
    products, keeps = lax.fori_loop(0, value_dim // block_v, step, carry)
    # all loads before the first is used: one wait
    row_factors = [factors[row, :] for row in range(layout.QUERY_N + 1)]
    q, k, p = early or load_keys()

    keep = jnp.zeros((CHUNK,), jnp.float32)
    for index, gradient in enumerate(keeps):
        keep = jnp.where(layout.lanes() == index, jnp.sum(gradient), keep)
    out.rows[layout.KEEP, :] = keep

    def through(rows: tuple[int, int], tile: jax.Array, sign: float = 1.0) -> jax.Array:
        """Gradient of the keys whose products the two rows of factors scale."""
        wide = sign * tile.astype(jnp.float32)
        for row in rows:
            out.rows[row, :] = jnp.sum(products[row] * wide, axis=1)
        scaled = [(sign * row_factors[row])[:, None] * products[row] for row in rows]
        return scaled[0] + scaled[1]

    # one pair of products is done with before the next: registers are short
    d_q = through((layout.QUERY_S, layout.QUERY_N), q)
    keys.store(d_q.astype(dtype), out.keys.q)
    d_k = through((layout.WRITE_S, layout.WRITE_N), k)
    d_p = through((layout.READ_S, layout.READ_N), p, sign=-1.0)
    if p_ref is None:
        d_k += d_p
    else:
        keys.store(d_p.astype(dtype), out.keys.p)
    keys.store(d_k.astype(dtype), out.keys.k)
