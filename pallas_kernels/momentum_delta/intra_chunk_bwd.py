"""Intra-chunk gradients: of q, k, p and of the coefficients by way of the scores of a chunk.

Computes (docs/algorithm.md, section 5):

    dA = tril(dO V'^T)       dL = -tril(dV V'^T, -1)
    dQ += scale (dA * gamma * eta) K
    dP += (dL * gamma_before * eta) K
    dK += scale (dA * gamma * eta)^T Q + (dL * gamma_before * eta)^T P
    attention: gradient of gamma eta,  dA * scale Q K^T
    overlap: gradient of gamma_before eta,  dL * P K^T

    inputs   q, k, p, gates; d_o, d_v, v_new [B, T, HV, V]; the gradients by way of the states
             (inter_chunk_bwd.py), to which those of the scores are added; scales of the sums;
             gamma_before; factors
    outputs  keys: the complete gradients [B, T, HV, K]; attention, overlap [B, HV, NT, C, C]
    grid     flat, HV x NT x B: one chunk of one value head a program

Why so: two products over V, in steps of block_v, give both [C, C] gradients; the rest is products
with keys that are then in registers. One gradient is stored before the next is begun, for registers
are short. Gradients of keys are written in place.

Constraints: K in blocks of block_k where shared memory is short (float32).

Run it alone: `python -m benchmarks stages --stages intra_chunk_bwd`.
"""

from functools import partial, reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import Precision, dot, kernel_call
from pallas_kernels.momentum_delta.block_scaling import ScoreSum, SumScales, quantize
from pallas_kernels.momentum_delta.block_specs import ChunkSpecs
from pallas_kernels.momentum_delta.coefficients import exp, iotas, log_gate
from pallas_kernels.momentum_delta.rows import FactorRow
from pallas_kernels.momentum_delta.types import (
    CHUNK,
    IntraChunk,
    KeyGradients,
    Leaf,
    Options,
    Tokens,
    Values,
)


class IntraChunkGradients(NamedTuple):
    """What the scores inside a chunk give.

    Attributes:
      keys: the complete gradients, in q's dtype.
      attention: gradient of `gamma eta` in the output, `[B, HV, NT, C, C]`.
      overlap: gradient of `gamma_before eta` in what a step reads, same shape.
      scale: block scales of both in float16, `[B, HV, NT, 2]` float32; None: 1.
    """

    keys: KeyGradients
    attention: Leaf
    overlap: Leaf
    scale: Leaf | None


def intra_chunk_bwd(
    x: Tokens,
    intra: IntraChunk,
    values: tuple[Values, Values, Values],
    from_states: KeyGradients,
    scales: SumScales | None,
    gamma: jax.Array,
    options: Options,
    *,
    in_place: bool = True,
) -> IntraChunkGradients:
    """Gradients by way of the scores inside a chunk.

    Args:
      x: the call's tokens.
      intra: from the forward pass.
      values: `d_o` (itself in its own dtype), `d_v` and `v_new`.
      from_states: gradients by way of the states, to which those of the scores are added.
      scales: from `block_scaling.scales_with_v_new`; None for float32.
      gamma: from `recompute_gamma`.
      options: of the call.
      in_place: the gradients take the memory of `from_states`: a tile is read before it is written.
    """
    z = x.sizes
    specs = ChunkSpecs(z)
    keys, gate = specs.tokens(z.key_dim, z.heads), specs.gate()
    p = None if x.p is None else specs.tokens(z.key_dim, z.p_heads)
    per_head, gradient = specs.tokens(z.key_dim, z.value_heads), z.per_head(z.key_dim, x.q.dtype)
    key_specs = KeyGradients(per_head, per_head, None if p is None else per_head)
    key_shapes = KeyGradients(gradient, gradient, None if p is None else gradient)
    dtype = options.numerics.operands
    matrix = z.per_chunk(CHUNK, CHUNK, dtype=dtype)
    scale = z.per_chunk(2, dtype=jnp.float32) if dtype == jnp.float16 else None
    tokens = x._replace(v=None, log_alpha=x.log_alpha if x.p is not None else None)
    keys_at = len(jax.tree.leaves((tokens, values)))
    return kernel_call(
        partial(
            _intra_chunk_bwd,
            value_dim=z.value_dim,
            block_v=min(options.tiles.intra_chunk_bwd_block_v, z.value_dim),
            options=options,
        ),
        tokens,
        values,
        from_states,
        scales,
        gamma,
        intra.factors,
        name="mdn_intra_chunk_bwd",
        grid=specs.grid,
        in_specs=[
            Tokens(keys, keys, None, p, None if p is None else gate, gate, gate, gate),
            tuple(specs.values(x) for x in values),
            key_specs,
            specs.scales(scales),
            specs.matrix(),
            specs.factors(),
        ],
        out_specs=IntraChunkGradients(
            key_specs, specs.matrix(), specs.matrix(), specs.scales(scale)
        ),
        out_shape=IntraChunkGradients(key_shapes, matrix, matrix, scale),
        aliases={keys_at + i: i for i in range(2 if x.p is None else 3)} if in_place else {},
        warps=options.tiles.intra_chunk_bwd_warps,
        stages=options.tiles.intra_chunk_bwd_stages,
        interpret=options.interpret,
    )


def _intra_chunk_bwd(
    x, values, from_states, scales, gamma, factors, out, *, value_dim, block_v, options
):
    precision, dtype = options.numerics.products, options.numerics.operands

    # loads that would stall after the loop
    log_mu, beta, eta = log_gate(x.log_mu, slice(None)), x.beta[...], x.eta[...]
    norm_q, norm_k = factors[FactorRow.NORM_Q, :], factors[FactorRow.NORM_K, :]
    gamma_before = gamma[...]

    by_output, by_erase = _over_values(values, scales, value_dim, block_v, precision)
    t, j = iotas()
    norm_p = norm_k if x.p is None else jnp.ones_like(norm_k)
    by_output = jnp.where(t >= j, by_output, 0.0) * norm_q[:, None] * norm_k[None, :]
    by_erase = jnp.where(t > j, -by_erase, 0.0) * norm_p[:, None] * norm_k[None, :]

    # in blocks of K where shared memory is short (float32)
    width = min(options.tiles.intra_chunk_bwd_block_k, x.q.shape[1])
    blocks = [pl.ds(first, width) for first in range(0, x.q.shape[1], width)]
    q, k = [x.q[:, block] for block in blocks], [x.k[:, block] for block in blocks]
    p = k if x.p is None else [x.p[:, block] for block in blocks]

    def products(rows: list[jax.Array]) -> jax.Array:
        return reduce(add, (dot(a, b.T, precision) for a, b in zip(rows, k, strict=True)))

    def operand(matrix: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        """In `dtype`, and its scale: float16 alone has too small a range for gradients."""
        if out.scale is None:
            return matrix.astype(dtype), 1.0
        tile, scale, _ = quantize(matrix)
        return tile, scale

    for index, (ref, matrix) in enumerate(
        ((out.attention, by_output * products(q)), (out.overlap, by_erase * products(p)))
    ):
        ref[...], scale = operand(matrix)
        if out.scale is not None:
            out.scale[index] = scale

    to_mu = jnp.cumsum(log_mu)
    exponents = jnp.minimum(to_mu[:, None] - to_mu[None, :], 0.0)
    carry = jnp.where(t >= j, exp(exponents), 0.0)
    gamma_before = gamma_before.astype(jnp.float32)
    lifted = (
        gamma_before
        if x.p is None
        else exp(log_gate(x.log_alpha, slice(None)))[:, None] * gamma_before
    )
    eta = eta[None, :]
    by_output, output_scale = operand(by_output * (lifted + beta[:, None] * carry) * eta)
    by_erase = by_erase * gamma_before * eta

    def product(matrix: jax.Array, scale: jax.Array | float, keys: jax.Array) -> jax.Array:
        result = dot(matrix, keys, precision)
        return result if out.scale is None else result * scale

    def plus(
        ref: Leaf, matrix: jax.Array, scale: jax.Array | float, keys: list[jax.Array]
    ) -> list[jax.Array]:
        return [
            ref[:, block].astype(jnp.float32) + product(matrix, scale, y)
            for block, y in zip(blocks, keys, strict=True)
        ]

    # one gradient is stored before the next is begun: registers are short
    d_q = plus(from_states.q, by_output, output_scale, k)
    of_q = norm_q * (1.0 / options.scale) if options.normalize else None
    _store_keys(out.keys.q, d_q, q, blocks, of_q)
    d_k = plus(from_states.k, by_output.T, output_scale, q)
    if x.p is None:
        both, scale = operand(by_erase + by_erase.T)
        d_k = [d + product(both, scale, y) for d, y in zip(d_k, k, strict=True)]
    else:
        by_erase, scale = operand(by_erase)
        d_k = [d + product(by_erase.T, scale, y) for d, y in zip(d_k, p, strict=True)]
    _store_keys(out.keys.k, d_k, k, blocks, norm_k if options.normalize else None)
    if x.p is not None:
        _store_keys(out.keys.p, plus(from_states.p, by_erase, scale, k), p, blocks, None)


def _over_values(
    values: tuple[Values, Values, Values],
    scales: SumScales | None,
    value_dim: int,
    block_v: int,
    precision: Precision,
) -> tuple[jax.Array, jax.Array]:
    """`dO V'^T` and `dV V'^T`, `[C, C]` float32, in steps of `block_v` columns."""
    do_ref, dv_ref, v_new_ref = (y.data for y in values)

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        at = pl.ds(i * block_v, block_v)
        d_o, d_v, v_new = do_ref[:, at], dv_ref[:, at], v_new_ref[:, at]
        if scales is not None:
            to_output, to_erase = (scales.columns[row, at][None, :] for row in ScoreSum)
            d_o = (d_o.astype(jnp.float32) * to_output).astype(v_new.dtype)
            d_v *= to_erase.astype(d_v.dtype)
        return (
            carry[0] + dot(d_o, v_new.T, precision),
            carry[1] + dot(d_v, v_new.T, precision),
        )

    square = jnp.zeros((CHUNK, CHUNK), jnp.float32)
    by_output, by_erase = lax.fori_loop(0, value_dim // block_v, step, (square, square))
    if scales is not None:
        by_output *= scales.scale[ScoreSum.OUTPUT]
        by_erase *= scales.scale[ScoreSum.ERASE]
    return by_output, by_erase


def _store_keys(
    ref: Leaf,
    gradients: list[jax.Array],
    keys: list[jax.Array],
    blocks: list[pl.Slice],
    norm: jax.Array | None,
) -> None:
    """Stores gradients of keys, through their inverse norms `[C]`; None: not normalised."""
    if norm is not None:
        wide = [y.astype(jnp.float32) for y in keys]
        along = reduce(add, (jnp.sum(g * y, axis=1) for g, y in zip(gradients, wide, strict=True)))
        along *= norm * norm
        gradients = [g - y * along[:, None] for g, y in zip(gradients, wide, strict=True)]
    for block, gradient in zip(blocks, gradients, strict=True):
        ref[:, block] = gradient.astype(ref.dtype)
