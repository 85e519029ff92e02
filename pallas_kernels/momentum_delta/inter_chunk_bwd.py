"""Gradients by way of the states: of q, k, p, of the row factors and of the chunk's scalars.

Computes (docs/algorithm.md, section 5), each before the factors of its rows:

    dQ = decay * (scale dO S0^T)  + lead * (scale dO N0^T)
    dP = -decay_before * (dV S0^T) - lead_before * (dV N0^T)
    dK = (eta * gamma[C]) * (V' dS^T) + (eta * carry[C]) * (V' dN^T)
    rows: the same products, times the keys, summed over K; scalars: <dS, S0>, <dS, N0>, <dN, N0>

    inputs   q, k, p; d_o, d_v, v_new [B, T, HV, V]; states and d_states [B, HV, NT, K, V];
             scales of the sums (block_scaling.py); factors
    outputs  keys: gradients [B, T, HV, K] as if the norms of q and k were constants;
             rows [B, HV, NT, K / block_k, 7, C] float32
    grid     flat, blocks of K x HV x NT x B: a block of K of one chunk a program

Why so: six products with the states at once, with V as the inner dimension in steps of block_v, so
that the states, most of the bytes of the backward pass, are read once.

Constraints: registers are short; the keys are loaded before the loop where states have 16 bits, and
after it in float32.

Run it alone: `python -m benchmarks stages --stages inter_chunk_bwd`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import dot, kernel_call
from pallas_kernels.momentum_delta.block_scaling import StateSum, SumScales
from pallas_kernels.momentum_delta.block_specs import ChunkSpecs
from pallas_kernels.momentum_delta.coefficients import lanes
from pallas_kernels.momentum_delta.isolation import clean, keeps_nothing
from pallas_kernels.momentum_delta.register_layout import RegisterLayout
from pallas_kernels.momentum_delta.rows import GRADIENT_ROWS, STATE_ROWS, STATE_SCALARS, FactorRow
from pallas_kernels.momentum_delta.types import (
    CHUNK,
    IntraChunk,
    KeyGradients,
    Leaf,
    Options,
    States,
    Tokens,
    Values,
)


class InterChunkGradients(NamedTuple):
    """What a chunk's entering and leaving states give.

    Attributes:
      keys: gradients as if the norms were constants, in q's dtype.
      rows: gradients of the row factors and of the chunk scalars, one part a block of K,
        `[B, HV, NT, K / block, ROW_GRADIENTS, C]` float32.
    """

    keys: KeyGradients
    rows: Leaf


def inter_chunk_bwd(
    x: Tokens,
    intra: IntraChunk,
    values: tuple[Values, Values, Values],
    states: States,
    d_states: States,
    scales: SumScales | None,
    options: Options,
) -> InterChunkGradients:
    """Gradients by way of the states.

    Args:
      x: the call's tokens.
      intra: from the forward pass.
      values: `d_o` (itself in its own dtype), `d_v` and `v_new`.
      states: states entering each chunk.
      d_states: gradients of the states leaving each chunk.
      scales: from `block_scaling.scales_with_states`; None for float32.
      options: of the call.
    """
    z = x.sizes
    block = min(options.tiles.inter_chunk_bwd_block_k, z.key_dim)
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
            _inter_chunk_bwd,
            value_dim=z.value_dim,
            block_v=min(options.tiles.inter_chunk_bwd_block_v, z.value_dim),
            warps=options.tiles.inter_chunk_bwd_warps,
            precision=options.numerics.products,
        ),
        (x.q, x.k, x.p),
        values,
        states,
        d_states,
        scales,
        intra.factors,
        name="mdn_inter_chunk_bwd",
        grid=specs.grid,
        in_specs=[
            (keys, keys, p),
            tuple(specs.values(x) for x in values),
            specs.states(states, block, z.value_dim, cut="k"),
            specs.states(d_states, block, z.value_dim, cut="k"),
            specs.scales(scales),
            specs.factors(),
        ],
        out_specs=InterChunkGradients(
            KeyGradients(per_head, per_head, None if p is None else per_head), specs.part()
        ),
        out_shape=InterChunkGradients(
            KeyGradients(gradient, gradient, None if p is None else gradient), rows
        ),
        warps=options.tiles.inter_chunk_bwd_warps,
        stages=options.tiles.inter_chunk_bwd_stages,
        interpret=options.interpret,
    )


def _inter_chunk_bwd(
    tokens, values, states, d_states, scales, factors, out, *, value_dim, block_v, warps, precision
):
    q_ref, k_ref, p_ref = tokens
    do_ref, dv_ref, v_new_ref = (x.data for x in values)
    dtype = q_ref.dtype
    key_dim = q_ref.shape[1]
    layout = RegisterLayout(warps, key_dim)
    order = layout.order()  # of the rows of states, so that products have the columns of keys

    def load_keys() -> tuple[jax.Array, ...]:
        q, k = layout.load(q_ref, CHUNK), layout.load(k_ref, CHUNK)
        return q, k, k if p_ref is None else layout.load(p_ref, CHUNK)

    # after the loop they would stall; float32 leaves no registers to have them before
    early = load_keys() if states.s.dtype.itemsize == 2 else None
    threads = min(key_dim, warps * 32 * 8 // block_v), block_v // 8  # with 8 numbers of a row each

    def within_threads(tile: jax.Array) -> jax.Array:
        """Sums of what each thread has of a tile of states: nothing is exchanged."""
        return jnp.sum(jnp.sum(tile.reshape(-1, *threads, 8), axis=3), axis=0)

    def step(i: jax.Array, carry):
        at = pl.ds(i * block_v, block_v)
        d_o, d_v, v_new = do_ref[:, at], dv_ref[:, at], v_new_ref[:, at]
        s, n = states.s[order, at], states.n[order, at]
        d_s, d_n = d_states.s[order, at], d_states.n[order, at]
        products, scalars = carry
        by_read, by_write, by_query = (s, n), (d_s, d_n), (s, n)
        if scales is not None:
            to_read, to_write, to_query, to_scalars = (
                scales.columns[row, at][None, :] for row in StateSum
            )
            by_read = tuple(y * to_read.astype(s.dtype) for y in by_read)
            by_write = tuple(y * to_write.astype(s.dtype) for y in by_write)
        s, n, d_s, d_n = (y.astype(jnp.float32) for y in (s, n, d_s, d_n))
        if scales is not None:
            # of what d_o multiplies bfloat16's digits are enough
            by_query = tuple((y * to_query).astype(d_o.dtype) for y in (s, n))
            d_s, d_n = (y * to_scalars for y in (d_s, d_n))
        # in the order of the factors
        rows = (d_v, d_v, v_new, v_new, d_o, d_o)
        operands = (*by_read, *by_write, *by_query)
        products = tuple(
            total + dot(row, state.T, precision)
            for total, row, state in zip(products, rows, operands, strict=True)
        )
        inner = (d_s * s, d_s * n, d_n * n)  # in the order of STATE_SCALARS
        scalars = tuple(
            total + within_threads(part) for total, part in zip(scalars, inner, strict=True)
        )
        return products, scalars

    square = jnp.zeros(q_ref.shape, jnp.float32)
    carry = ((square,) * 6, (jnp.zeros(threads, jnp.float32),) * 3)
    products, scalars = lax.fori_loop(0, value_dim // block_v, step, carry)
    # all loads before the first is used: one wait
    row_factors = [factors[row, :] for row in STATE_ROWS]
    if scales is not None:
        power_k, power_p = factors[FactorRow.POWER_K, :], factors[FactorRow.POWER_P, :]
        for row, power in enumerate((power_p, power_p, power_k, power_k)):
            row_factors[row] *= power
    q, k, p = early or load_keys()

    row = jnp.zeros((CHUNK,), jnp.float32)
    for place, gradient in zip(STATE_SCALARS, scalars, strict=True):
        row = jnp.where(lanes() == int(place), jnp.sum(gradient), row)
    if scales is not None:
        row *= scales.scale[StateSum.STATES]
    three = (factors[FactorRow.SCALARS, i] for i in STATE_SCALARS)
    out.rows[FactorRow.SCALARS, :] = clean(row, keeps_nothing(*three))

    def through(rows: tuple[int, int], tile: jax.Array, sign: float = 1.0) -> jax.Array:
        """Gradient of the keys whose products the two rows of factors scale."""
        by = sign if scales is None else sign * scales.scale[rows[0] // 2]
        wide = tile.astype(jnp.float32)
        dead = (row_factors[rows[0]] == 0) & (row_factors[rows[1]] == 0)
        for row in rows:
            out.rows[row, :] = clean(jnp.sum(products[row] * wide, axis=1) * by, dead)
        both = [(row_factors[row] * by)[:, None] * products[row] for row in rows]
        return clean(both[0] + both[1], dead[:, None])

    # one pair of products is done with before the next: registers are short
    d_q = through((FactorRow.QUERY_S, FactorRow.QUERY_N), q)
    layout.store(d_q.astype(dtype), out.keys.q)
    d_k = through((FactorRow.WRITE_S, FactorRow.WRITE_N), k)
    d_p = through((FactorRow.READ_S, FactorRow.READ_N), p, sign=-1.0)
    if p_ref is None:
        d_k += d_p
    else:
        layout.store(d_p.astype(dtype), out.keys.p)
    layout.store(d_k.astype(dtype), out.keys.k)
