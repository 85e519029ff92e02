"""The kernel that takes all of a chunk that needs no state, forward; one chunk a program."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import dot, kernel_call
from pallas_kernels.momentum_delta.block_specs import ChunkSpecs
from pallas_kernels.momentum_delta.coefficients import (
    Ends,
    Quarters,
    after,
    diagonal,
    ends,
    half_coefficients,
    halves,
    inverse_norm,
    iotas,
    log_gate,
    lower_quarters,
    squares,
    unit_lower_inverse,
)
from pallas_kernels.momentum_delta.rows import (
    REACHES,
    STATE_ROWS,
    ChunkScalar,
    FactorRow,
    pack_scalars,
)
from pallas_kernels.momentum_delta.types import (
    CHUNK,
    HALF,
    HALVES,
    Leaf,
    Options,
    Prepared,
    Tokens,
    WalkKeys,
)
from pallas_kernels.momentum_delta.units import (
    SHORTEST,
    Unit,
    power_of_two,
    unit_of,
)


def prepare(x: Tokens, options: Options) -> Prepared:
    """The first kernel: all of a chunk that needs no state."""
    z = x.sizes
    specs = ChunkSpecs(z)
    keys, gate = specs.tokens(z.key_dim, z.heads), specs.gate()
    p = None if x.p is None else specs.tokens(z.key_dim, z.p_heads)
    storage = options.numerics.storage
    walk_keys = walk_specs = None
    if storage == jnp.float16:
        walk_keys = WalkKeys(
            *jax.tree.map(lambda y: jax.ShapeDtypeStruct(y.shape, storage), (x.k, x.p))
        )
        walk_specs = WalkKeys(keys, p)
    return kernel_call(
        partial(_prepare, options=options),
        x._replace(v=None),
        name="mdn_prepare",
        grid=specs.grid,
        in_specs=[Tokens(keys, keys, None, p, gate, gate, gate, gate)],
        out_specs=Prepared(specs.matrix(), specs.matrix(), specs.factors(), walk_specs),
        out_shape=Prepared(
            z.per_chunk(CHUNK, CHUNK, dtype=options.numerics.operands),
            z.per_chunk(CHUNK, CHUNK, dtype=storage),
            z.per_chunk(len(FactorRow), CHUNK, dtype=jnp.float32),
            walk_keys,
        ),
        warps=options.tiles.prepare_warps,
        stages=1,
        interpret=options.interpret,
    )


_Pair = tuple[jax.Array, jax.Array]
"""Of the two halves of a chunk."""


class _Half(NamedTuple):
    """What is left of half a chunk when its coefficients are stored."""

    lower: jax.Array  # [n, n]
    ends: Ends
    read_total: jax.Array  # [n], as the following
    read_lead: jax.Array
    out_total: jax.Array
    out_lead: jax.Array


def _prepare(x, out, *, options):
    precision = options.numerics.exact
    operands = options.numerics.operands
    coarse = options.numerics.coefficients
    explicit_p = x.p is not None

    first, second = HALVES
    eta = tuple(x.eta[half] for half in HALVES)  # used twice, far apart: no second wait for a load
    q, k = x.q[...], x.k[...]
    p = x.p[...] if explicit_p else k
    k_t = k.T
    ones = halves(jnp.ones((CHUNK,), jnp.float32))
    in_units = options.numerics.scaled
    overlaps = lower_quarters(dot(p, k_t, precision))
    square_q = halves(squares(q))
    if explicit_p or k.dtype == jnp.float32:
        square_k = halves(squares(k))
    else:  # products of 16-bit numbers are exact
        square_k = diagonal(overlaps.first), diagonal(overlaps.second)
    square_p = halves(squares(p)) if explicit_p else square_k
    norm_q = norm_k = ones
    if options.normalize:
        norm_q, norm_k = (tuple(map(inverse_norm, y)) for y in (square_q, square_k))
    norm_q = tuple(options.scale * norm for norm in norm_q)
    norm_p = ones if explicit_p else norm_k
    write = tuple(y * norm for y, norm in zip(eta, norm_k, strict=True))

    def scaled(m: Quarters, norm: _Pair) -> Quarters:
        return Quarters(
            m.first * norm[0][:, None] * write[0][None, :],
            m.corner * norm[1][:, None] * write[0][None, :],
            m.second * norm[1][:, None] * write[1][None, :],
        )

    overlaps = scaled(overlaps, norm_p)
    scores = scaled(lower_quarters(dot(q, k_t, precision)), norm_q)

    def store(ref, row: pl.Slice, column: pl.Slice, value: jax.Array) -> None:
        ref[row, column] = value.astype(ref.dtype)

    def rows(index: int, values: _Pair, by: _Pair) -> None:
        for half, value, factor in zip(HALVES, values, by, strict=True):
            out.factors[index, half] = value * factor

    rows(FactorRow.NORM_Q, norm_q, ones)
    rows(FactorRow.NORM_K, norm_k, ones)

    # of keys as the walks have them
    to_read, to_key, longest_q = norm_p, norm_k, norm_q
    sizes_k = sizes_p = ones
    if in_units:
        powers_k = powers_p = _powers(square_k)
        _store_scaled(out.keys.k, x.k, powers_k)
        if explicit_p:
            powers_p = _powers(square_p)
            _store_scaled(out.keys.p, x.p, powers_p)
        sizes_k, sizes_p = (tuple(y.size for y in powers) for powers in (powers_k, powers_p))
        to_read, to_key = (
            tuple(norm * power.inverse for norm, power in zip(norms, both, strict=True))
            for norms, both in ((norm_p, powers_p), (norm_k, powers_k))
        )
        # no element of a key is larger than the key is long, which those of the walks are by 1
        longest_q = ones if options.normalize else tuple(map(jnp.sqrt, square_q))
        longest_q = tuple(options.scale * y for y in longest_q)
        if x.q.dtype == jnp.float16:  # the walk back multiplies queries as they are
            longest_q = tuple(jnp.maximum(y, z) for y, z in zip(longest_q, norm_q, strict=True))

    rows(FactorRow.POWER_K, sizes_k, ones)
    rows(FactorRow.POWER_P, sizes_p, ones)

    def half_chunk(index: jax.Array, carry: tuple[_Half, _Half]) -> tuple[_Half, _Half]:
        at = pl.ds(index * HALF, HALF)
        log_alpha, log_mu = log_gate(x.log_alpha, at), log_gate(x.log_mu, at)
        half = half_coefficients(log_alpha, log_mu, x.beta[at], explicit_p, coarse)
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
    store(out.attention, second, first, scores.corner * query.gamma)
    lower = Quarters(half_1.lower, overlaps.corner * read.gamma, half_2.lower)

    total, lead = end_2.total, end_2.lead  # of the second half, seen from the end
    reads = (half_1.read_total, read.total), (half_1.read_lead, read.lead)
    queries = (half_1.out_total, query.total), (half_1.out_lead, query.lead)
    writes = (
        (total * end_1.gamma + lead * end_1.w, end_2.gamma),
        (end_2.momentum * end_1.w, end_2.w),
    )
    out.factors[FactorRow.SECOND_HALF, first] = half_2.read_total
    out.factors[FactorRow.SECOND_HALF, second] = half_2.read_lead
    out.factors[FactorRow.FIRST_END, first], out.factors[FactorRow.FIRST_END, second] = (
        end_1.gamma,
        end_1.w,
    )
    keeps = {
        ChunkScalar.DECAY: total * end_1.total,
        ChunkScalar.LEAD: total * end_1.lead + lead * end_1.momentum,
        ChunkScalar.MOMENTUM: end_2.momentum * end_1.momentum,
        ChunkScalar.DECAY_1: end_1.total,
        ChunkScalar.LEAD_1: end_1.lead,
        ChunkScalar.MOMENTUM_1: end_1.momentum,
        ChunkScalar.MOMENTUM_2: end_2.momentum,
    }
    to_write = tuple(y * norm for y, norm in zip(eta, to_key, strict=True))
    for index, of_states, norm, longest in (
        (FactorRow.READ_S, reads, to_read, to_read),
        (FactorRow.WRITE_S, writes, to_write, to_write),
        (FactorRow.QUERY_S, queries, norm_q, longest_q),
    ):
        for row, of_state in zip(STATE_ROWS[index : index + 2], of_states, strict=True):
            rows(row, of_state, norm)
            if in_units:
                reach = [abs(y * size) for y, size in zip(of_state, longest, strict=True)]
                keeps[REACHES[row]] = jnp.sum(reach[0] + reach[1])
    inverse = unit_lower_inverse(lower, coarse, float16=operands != jnp.float32)
    row, column = iotas(HALF)
    mixing = Quarters(
        jnp.where(row > column, inverse.first, 0.0),
        inverse.corner,
        jnp.where(row > column, inverse.second, 0.0),
    )
    if in_units:
        unit = unit_of(_largest_sum(mixing))
        mixing = Quarters(*(y * unit.inverse for y in mixing))
        keeps[ChunkScalar.INVERSE_SCALE] = unit.size
    out.factors[FactorRow.SCALARS, :] = pack_scalars(keeps)

    store(out.mixing, first, first, mixing.first)
    store(out.mixing, second, first, mixing.corner)
    store(out.mixing, second, second, mixing.second)
    for ref in (out.attention, out.mixing):
        ref[first, second] = jnp.zeros((HALF, HALF), ref.dtype)


def _powers(square: _Pair) -> tuple[Unit, Unit]:
    """By which rows become about 1 long, from the squares of their lengths."""
    first, second = (power_of_two(lax.rsqrt(jnp.maximum(y, SHORTEST**2))) for y in square)
    return first, second


def _store_scaled(ref: Leaf, keys: Leaf, powers: tuple[Unit, Unit]) -> None:
    """Loaded once more: the tile would take registers that products need. In halves, for the same.

    Value heads that share keys all store the same.
    """
    loaded = [keys[half, :] for half in HALVES]
    for half, tile, power in zip(HALVES, loaded, powers, strict=True):
        scaled = tile.astype(jnp.float32) * power.size[:, None]
        ref[half, :] = scaled.astype(ref.dtype)


def _largest_sum(x: Quarters) -> jax.Array:
    """At least the largest sum of a row or a column of sizes: what it can make of numbers of 1."""
    both = abs(x.corner) + jnp.maximum(abs(x.first), abs(x.second))
    return jnp.maximum(jnp.max(jnp.sum(both, axis=1)), jnp.max(jnp.sum(both, axis=0)))
