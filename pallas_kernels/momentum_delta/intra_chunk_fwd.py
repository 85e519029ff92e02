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

from pallas_kernels.lowering import Precision, dot, kernel_call
from pallas_kernels.momentum_delta.block_scaling import SHORTEST, Scale, power_of_two, scale_for
from pallas_kernels.momentum_delta.block_specs import ChunkSpecs
from pallas_kernels.momentum_delta.coefficients import (
    Coefficients,
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
from pallas_kernels.momentum_delta.numerics import Numerics
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


class _Rows(NamedTuple):
    """What is known of the rows of q, k and p, in the two halves.

    Attributes:
      norm_q: inverse norms, times the scale of the output.
      norm_k: inverse norms.
      norm_p: the same; 1 if p is explicit.
      square_q: squares of lengths.
      square_k: the same.
      square_p: the same.
      ones: 1.
    """

    norm_q: _Pair
    norm_k: _Pair
    norm_p: _Pair
    square_q: _Pair
    square_k: _Pair
    square_p: _Pair
    ones: _Pair


class _StateRows(NamedTuple):
    """What scales rows of P, K and Q in products with states, beside the coefficients.

    Attributes:
      read: of P as the state passes have it.
      write: of K as they have it, without eta.
      query: of Q.
      longest_q: at least what a scaled row of Q is long.
    """

    read: _Pair
    write: _Pair
    query: _Pair
    longest_q: _Pair


def _intra_chunk_fwd(x, out, *, options):
    numerics = options.numerics
    first, second = HALVES
    eta = tuple(x.eta[half] for half in HALVES)  # used twice, far apart: no second wait for a load
    overlaps, scores, known = _scores(x, eta, options)
    state_rows = _store_rows(x, out, known, options)
    half_1, half_2 = _both_halves(x, out.attention, overlaps, scores, numerics.coefficients)

    # the second half sees the first by way of its end
    before = across_halves(half_2.decay_before, half_2.lead_before, half_1.end)
    after = across_halves(half_2.decay, half_2.lead, half_1.end)
    _store(out.attention, second, first, scores.corner * after.gamma)
    lower = Quarters(half_1.lower, overlaps.corner * before.gamma, half_2.lower)

    scalars = _store_state_factors(
        out.factors, eta, (half_1, half_2), (before, after), state_rows, reach=numerics.scaled
    )
    inverse = _solve(lower, numerics)
    if numerics.scaled:
        scale = scale_for(_largest_sum(inverse))
        inverse = Quarters(*(y * scale.inverse for y in inverse))
        scalars[ChunkScalar.INVERSE_SCALE] = scale.size
    out.factors[FactorRow.SCALARS, :] = pack_scalars(scalars)

    _store(out.inverse, first, first, inverse.first)
    _store(out.inverse, second, first, inverse.corner)
    _store(out.inverse, second, second, inverse.second)
    for ref in (out.attention, out.inverse):
        ref[first, second] = jnp.zeros((HALF, HALF), ref.dtype)


def _store(ref: Leaf, row: pl.Slice, column: pl.Slice, value: jax.Array) -> None:
    ref[row, column] = value.astype(ref.dtype)


def _store_row(factors: Leaf, row: FactorRow, values: _Pair, by: _Pair) -> None:
    """Sets a row of factors to `values * by`."""
    for half, value, factor in zip(HALVES, values, by, strict=True):
        factors[row, half] = value * factor


def _scores(x: Tokens, eta: _Pair, options: Options) -> tuple[Quarters, Quarters, _Rows]:
    """`P K^T` and `Q K^T`, times norms and eta, and the norms."""
    explicit_p, precision = x.p is not None, options.numerics.exact
    q, k = x.q[...], x.k[...]
    p = k if x.p is None else x.p[...]
    k_t = k.T
    ones = halves(jnp.ones((CHUNK,), jnp.float32))
    overlaps = lower_quarters(dot(p, k_t, precision))
    square_q = halves(squares(q))
    if explicit_p or k.dtype == jnp.float32:
        square_k = halves(squares(k))
    else:  # products of 16-bit numbers are exact
        square_k = diagonal(overlaps.first), diagonal(overlaps.second)
    square_p = halves(squares(p)) if explicit_p else square_k
    norm_q = norm_k = ones
    if options.normalize:
        norm_q, norm_k = _inverse_norms(square_q), _inverse_norms(square_k)
    norm_q = options.scale * norm_q[0], options.scale * norm_q[1]
    norm_p = ones if explicit_p else norm_k
    write = eta[0] * norm_k[0], eta[1] * norm_k[1]

    def scaled(m: Quarters, norm: _Pair) -> Quarters:
        return Quarters(
            m.first * norm[0][:, None] * write[0][None, :],
            m.corner * norm[1][:, None] * write[0][None, :],
            m.second * norm[1][:, None] * write[1][None, :],
        )

    overlaps = scaled(overlaps, norm_p)
    scores = scaled(lower_quarters(dot(q, k_t, precision)), norm_q)
    known = _Rows(norm_q, norm_k, norm_p, square_q, square_k, square_p, ones)
    return overlaps, scores, known


def _inverse_norms(square: _Pair) -> _Pair:
    return inverse_norm(square[0]), inverse_norm(square[1])


def _store_rows(x: Tokens, out: IntraChunk, known: _Rows, options: Options) -> _StateRows:
    """Stores norms, the keys of the state passes and by what their rows are multiplied."""
    _store_row(out.factors, FactorRow.NORM_Q, known.norm_q, known.ones)
    _store_row(out.factors, FactorRow.NORM_K, known.norm_k, known.ones)
    to_read, to_key, longest_q = known.norm_p, known.norm_k, known.norm_q
    sizes_k = sizes_p = known.ones
    if out.keys is not None:
        powers_k = powers_p = _powers(known.square_k)
        _store_scaled(out.keys.k, x.k, powers_k)
        if x.p is not None:
            powers_p = _powers(known.square_p)
            _store_scaled(out.keys.p, x.p, powers_p)
        sizes_k, sizes_p = ((powers[0].size, powers[1].size) for powers in (powers_k, powers_p))
        to_read, to_key = (
            (norms[0] * powers[0].inverse, norms[1] * powers[1].inverse)
            for norms, powers in ((known.norm_p, powers_p), (known.norm_k, powers_k))
        )
        # no element of a key is larger than the key is long, which those of the passes are by 1
        longest_q = known.ones
        if not options.normalize:
            longest_q = jnp.sqrt(known.square_q[0]), jnp.sqrt(known.square_q[1])
        longest_q = options.scale * longest_q[0], options.scale * longest_q[1]
        if x.q.dtype == jnp.float16:  # the state pass backward multiplies queries as they are
            longest_q = (
                jnp.maximum(longest_q[0], known.norm_q[0]),
                jnp.maximum(longest_q[1], known.norm_q[1]),
            )
    _store_row(out.factors, FactorRow.POWER_K, sizes_k, known.ones)
    _store_row(out.factors, FactorRow.POWER_P, sizes_p, known.ones)
    return _StateRows(to_read, to_key, known.norm_q, longest_q)


def _both_halves(
    x: Tokens, attention: Leaf, overlaps: Quarters, scores: Quarters, precision: Precision
) -> tuple[_Half, _Half]:
    """Coefficients of the halves, one after the other; stores the attention within each."""

    def half_chunk(index: jax.Array, carry: tuple[_Half, _Half]) -> tuple[_Half, _Half]:
        at = pl.ds(index * HALF, HALF)
        log_alpha, log_mu = log_gate(x.log_alpha, at), log_gate(x.log_mu, at)
        half = half_coefficients(log_alpha, log_mu, x.beta[at], x.p is not None, precision)
        score = jnp.where(index == 0, scores.first, scores.second)
        overlap = jnp.where(index == 0, overlaps.first, overlaps.second)
        _store(attention, at, at, score * half.after.gamma)
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
    result: tuple[_Half, _Half] = lax.fori_loop(0, 2, half_chunk, (none, none))
    return result


def _store_state_factors(
    factors: Leaf,
    eta: _Pair,
    of_halves: tuple[_Half, _Half],
    across: tuple[Coefficients, Coefficients],
    rows: _StateRows,
    *,
    reach: bool,
) -> dict[ChunkScalar, jax.Array]:
    """Stores the rows that scale products with states.

    Args:
      factors: `[13, C]`.
      eta: write scales.
      of_halves: their coefficients.
      across: what the second half sees before and after its writes, from the chunk's start on.
      rows: what scales the rows beside the coefficients.
      reach: with the scalars `REACHES`.

    Returns:
      The chunk's scalars.
    """
    half_1, half_2 = of_halves
    end_1, end_2 = half_1.end, half_2.end
    before, after = across
    decay, lead = end_2.decay, end_2.lead  # of the second half, seen from the end
    reads = (half_1.decay_before, before.decay), (half_1.lead_before, before.lead)
    queries = (half_1.decay, after.decay), (half_1.lead, after.lead)
    writes = (
        (decay * end_1.gamma + lead * end_1.carry, end_2.gamma),
        (end_2.momentum * end_1.carry, end_2.carry),
    )
    first, second = HALVES
    factors[FactorRow.SECOND_HALF, first] = half_2.decay_before
    factors[FactorRow.SECOND_HALF, second] = half_2.lead_before
    factors[FactorRow.FIRST_END, first] = end_1.gamma
    factors[FactorRow.FIRST_END, second] = end_1.carry
    scalars = {
        ChunkScalar.DECAY: decay * end_1.decay,
        ChunkScalar.LEAD: decay * end_1.lead + lead * end_1.momentum,
        ChunkScalar.MOMENTUM: end_2.momentum * end_1.momentum,
        ChunkScalar.DECAY_1: end_1.decay,
        ChunkScalar.LEAD_1: end_1.lead,
        ChunkScalar.MOMENTUM_1: end_1.momentum,
        ChunkScalar.MOMENTUM_2: end_2.momentum,
    }
    write = eta[0] * rows.write[0], eta[1] * rows.write[1]
    norms, longest = (rows.read, write, rows.query), (rows.read, write, rows.longest_q)
    for i, of_states in enumerate((reads, writes, queries)):
        for row, of_state in zip(STATE_ROWS[2 * i : 2 * i + 2], of_states, strict=True):
            _store_row(factors, row, of_state, norms[i])
            if reach:
                size_1, size_2 = (abs(y * z) for y, z in zip(of_state, longest[i], strict=True))
                scalars[REACHES[row]] = jnp.sum(size_1 + size_2)
    return scalars


def _solve(lower: Quarters, numerics: Numerics) -> Quarters:
    """`(I + L)^-1 - I`."""
    float16 = numerics.operands != jnp.float32
    inverse = unit_lower_inverse(lower, numerics.coefficients, float16=float16)
    row, column = iotas(HALF)
    return Quarters(
        jnp.where(row > column, inverse.first, 0.0),
        inverse.corner,
        jnp.where(row > column, inverse.second, 0.0),
    )


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
