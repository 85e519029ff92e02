"""Intra-chunk, forward: all of a chunk that needs no state (K K^T, the triangular solve, Q K^T).

Computes, for each chunk and value head (docs/algorithm.md, sections 2 and 3):

    attention = tril(Q K^T * gamma * eta) * scale
    inverse   = (I + L)^-1 - I,    L = tril(P K^T * gamma_before * eta, -1)
    factors   = the rows that scale P, K, Q in the products with the states; the chunk's scalars

with q and k normalised by way of the factors, never as arrays. `inverse` is stored without its
unit diagonal, so that float16 holds the small rest with all its digits.

    inputs   q, k [B, T, H, K], p or None, gates [B, T, HV] float32
    outputs  attention, inverse [B, HV, NT, C, C]; factors [B, HV, NT, 13, C] float32 (rows.py);
             keys: k and p in float16, rows about 1 long (for 16-bit inputs)
    grid     flat, HV x NT x B: one chunk of one value head a program

Why so: everything here is [C, C] or smaller but q, k and p, which are read once. Gates become
coefficients half a chunk at a time (coefficients.py), in a loop: code that is run once waits for
its instructions. Both halves of the inverse are solved side by side, for each waits for its own
products.

Constraints: K is 16, 32, 64, 128 or 256; T is a multiple of C. Loads that are used twice are loaded
once, early or late, as registers allow: the order of statements is measured.

Run it alone: `python -m benchmarks stages --stages intra_chunk_fwd`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import dot, kernel_call
from pallas_kernels.momentum_delta.block_scaling import SHORTEST, Scale, power_of_two, scale_for
from pallas_kernels.momentum_delta.block_specs import ChunkSpecs
from pallas_kernels.momentum_delta.coefficients import (
    HalfEnd,
    Quarters,
    across_halves,
    diagonal,
    half_coefficients,
    half_end,
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
    IntraChunk,
    Leaf,
    Options,
    Tokens,
    WalkKeys,
)


def intra_chunk_fwd(x: Tokens, options: Options) -> IntraChunk:
    """All of a chunk that needs no state."""
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
        partial(_intra_chunk_fwd, options=options),
        x._replace(v=None),
        name="mdn_intra_chunk_fwd",
        grid=specs.grid,
        in_specs=[Tokens(keys, keys, None, p, gate, gate, gate, gate)],
        out_specs=IntraChunk(specs.matrix(), specs.matrix(), specs.factors(), walk_specs),
        out_shape=IntraChunk(
            z.per_chunk(CHUNK, CHUNK, dtype=options.numerics.operands),
            z.per_chunk(CHUNK, CHUNK, dtype=storage),
            z.per_chunk(len(FactorRow), CHUNK, dtype=jnp.float32),
            walk_keys,
        ),
        warps=options.tiles.intra_chunk_fwd_warps,
        stages=1,
        interpret=options.interpret,
    )


_Pair = tuple[jax.Array, jax.Array]
"""Of the two halves of a chunk."""


class _Half(NamedTuple):
    """What is left of half a chunk when its coefficients are stored."""

    lower: jax.Array  # [n, n]
    end: HalfEnd
    decay_before: jax.Array  # [n], as the following
    lead_before: jax.Array
    decay: jax.Array
    lead: jax.Array


def _intra_chunk_fwd(x, out, *, options):
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
    quantized = options.numerics.scaled
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
    if quantized:
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
        store(out.attention, at, at, score * half.after.gamma)
        return carry[1], _Half(
            lower=overlap * half.before.gamma,
            end=half_end(half),
            decay_before=half.before.decay,
            lead_before=half.before.lead,
            decay=half.after.decay,
            lead=half.after.lead,
        )

    # a loop, for code that is run once waits for its instructions
    square, row = jnp.zeros((HALF, HALF), jnp.float32), jnp.zeros((HALF,), jnp.float32)
    none = _Half(square, HalfEnd(row, row, *(jnp.float32(0),) * 3), row, row, row, row)
    half_1, half_2 = lax.fori_loop(0, 2, half_chunk, (none, none))
    end_1, end_2 = half_1.end, half_2.end

    before = across_halves(half_2.decay_before, half_2.lead_before, end_1)
    after = across_halves(half_2.decay, half_2.lead, end_1)
    store(out.attention, second, first, scores.corner * after.gamma)
    lower = Quarters(half_1.lower, overlaps.corner * before.gamma, half_2.lower)

    decay, lead = end_2.decay, end_2.lead  # of the second half, seen from the end
    reads = (half_1.decay_before, before.decay), (half_1.lead_before, before.lead)
    queries = (half_1.decay, after.decay), (half_1.lead, after.lead)
    writes = (
        (decay * end_1.gamma + lead * end_1.carry, end_2.gamma),
        (end_2.momentum * end_1.carry, end_2.carry),
    )
    out.factors[FactorRow.SECOND_HALF, first] = half_2.decay_before
    out.factors[FactorRow.SECOND_HALF, second] = half_2.lead_before
    out.factors[FactorRow.FIRST_END, first], out.factors[FactorRow.FIRST_END, second] = (
        end_1.gamma,
        end_1.carry,
    )
    scalars = {
        ChunkScalar.DECAY: decay * end_1.decay,
        ChunkScalar.LEAD: decay * end_1.lead + lead * end_1.momentum,
        ChunkScalar.MOMENTUM: end_2.momentum * end_1.momentum,
        ChunkScalar.DECAY_1: end_1.decay,
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
            if quantized:
                reach = [abs(y * size) for y, size in zip(of_state, longest, strict=True)]
                scalars[REACHES[row]] = jnp.sum(reach[0] + reach[1])
    inverse = unit_lower_inverse(lower, coarse, float16=operands != jnp.float32)
    row, column = iotas(HALF)
    inverse = Quarters(
        jnp.where(row > column, inverse.first, 0.0),
        inverse.corner,
        jnp.where(row > column, inverse.second, 0.0),
    )
    if quantized:
        scale = scale_for(_largest_sum(inverse))
        inverse = Quarters(*(y * scale.inverse for y in inverse))
        scalars[ChunkScalar.INVERSE_SCALE] = scale.size
    out.factors[FactorRow.SCALARS, :] = pack_scalars(scalars)

    store(out.inverse, first, first, inverse.first)
    store(out.inverse, second, first, inverse.corner)
    store(out.inverse, second, second, inverse.second)
    for ref in (out.attention, out.inverse):
        ref[first, second] = jnp.zeros((HALF, HALF), ref.dtype)


def _powers(square: _Pair) -> tuple[Scale, Scale]:
    """By which rows become about 1 long, from the squares of their lengths."""
    first, second = (power_of_two(lax.rsqrt(jnp.maximum(y, SHORTEST**2))) for y in square)
    return first, second


def _store_scaled(ref: Leaf, keys: Leaf, powers: tuple[Scale, Scale]) -> None:
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
