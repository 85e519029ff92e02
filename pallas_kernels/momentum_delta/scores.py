"""The backward kernels of the scores inside a chunk.

Formulas: docs/algorithm.md, section 5.
"""

from functools import partial, reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import dot, kernel_call
from pallas_kernels.momentum_delta.backward import KeyGradients
from pallas_kernels.momentum_delta.block_specs import ChunkSpecs
from pallas_kernels.momentum_delta.coefficients import (
    Ends,
    after,
    exp,
    half_coefficients,
    iotas,
    log_gate,
)
from pallas_kernels.momentum_delta.rows import FactorRow
from pallas_kernels.momentum_delta.types import (
    CHUNK,
    HALF,
    HALVES,
    Leaf,
    Options,
    Prepared,
    Tokens,
    Values,
)
from pallas_kernels.momentum_delta.units import ERROR, OUTPUT, Sums, stored


def read_gamma(x: Tokens, factors: jax.Array, options: Options) -> jax.Array:
    """The seventh kernel, half a chunk a program: gamma as errors see it, `[B, HV, NT, C, C]`.

    `prepare` has it too; to compute it once more takes longer than to keep it, but the forward pass
    is without its store, and the residuals without its memory.

    Args:
      x: the call's tokens.
      factors: from the forward pass.
      options: of the call.
    """
    z = x.sizes
    specs = ChunkSpecs(z, len(HALVES))
    gate, dtype = specs.gate(), options.numerics.operands
    return kernel_call(
        partial(
            _read_gamma,
            half_of=specs.block,
            explicit_p=x.p is not None,
            precision=options.numerics.coefficients,
        ),
        (x.log_alpha, x.log_mu, x.beta),
        factors,
        name="mdn_read_gamma",
        grid=specs.grid,
        in_specs=[(gate, gate, gate), specs.factors()],
        out_specs=specs.matrix(),
        out_shape=z.per_chunk(CHUNK, CHUNK, dtype=dtype),
        warps=1,
        stages=1,
        interpret=options.interpret,
    )


def _read_gamma(gates, factors, out, *, half_of, explicit_p, precision):
    index = half_of(pl.program_id(0))
    first, second = HALVES
    own, other = pl.ds(index * HALF, HALF), pl.ds((1 - index) * HALF, HALF)
    log_alpha, log_mu, beta = gates
    half = half_coefficients(
        log_gate(log_alpha, own), log_gate(log_mu, own), beta[own], explicit_p, precision
    )
    out[own, own] = half.read.gamma.astype(out.dtype)
    # the second half sees the first by way of its end; the first sees nothing of the second
    end = Ends(
        factors[FactorRow.FIRST_END, first],
        factors[FactorRow.FIRST_END, second],
        *(jnp.float32(0),) * 3,
    )
    total, lead = factors[FactorRow.SECOND_HALF, first], factors[FactorRow.SECOND_HALF, second]
    seen = jnp.where(index == 1, after(total, lead, end).gamma, 0.0)
    out[own, other] = seen.astype(out.dtype)


class FromScores(NamedTuple):
    """What the scores inside a chunk give.

    Attributes:
      keys: the complete gradients, in q's dtype.
      attention: gradient of `gamma eta` in the output, `[B, HV, NT, C, C]`.
      overlap: gradient of `gamma_read eta` in the error, same shape.
      unit: what float16 counts in, of both, `[B, HV, NT, 2]` float32; None: 1.
    """

    keys: KeyGradients
    attention: Leaf
    overlap: Leaf
    unit: Leaf | None


def score_gradients(
    x: Tokens,
    prepared: Prepared,
    values: tuple[Values, Values, Values],
    from_states: KeyGradients,
    units: Sums | None,
    gamma: jax.Array,
    options: Options,
    *,
    in_place: bool = True,
) -> FromScores:
    """The eighth kernel.

    Args:
      x: the call's tokens.
      prepared: from the forward pass.
      values: `d_o` (itself in its own dtype), `d_v` and `error`.
      from_states: gradients by way of the states, to which those of the scores are added.
      units: from `units.sums_with_errors`; None for float32.
      gamma: from `read_gamma`.
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
    unit = z.per_chunk(2, dtype=jnp.float32) if dtype == jnp.float16 else None
    tokens = x._replace(v=None, log_alpha=x.log_alpha if x.p is not None else None)
    keys_at = len(jax.tree.leaves((tokens, values)))
    return kernel_call(
        partial(
            _score_gradients,
            value_dim=z.value_dim,
            block_v=min(options.tiles.scores_block_v, z.value_dim),
            options=options,
        ),
        tokens,
        values,
        from_states,
        units,
        gamma,
        prepared.factors,
        name="mdn_score_gradients",
        grid=specs.grid,
        in_specs=[
            Tokens(keys, keys, None, p, None if p is None else gate, gate, gate, gate),
            tuple(specs.values(x) for x in values),
            key_specs,
            specs.units(units),
            specs.matrix(),
            specs.factors(),
        ],
        out_specs=FromScores(key_specs, specs.matrix(), specs.matrix(), specs.units(unit)),
        out_shape=FromScores(key_shapes, matrix, matrix, unit),
        aliases={keys_at + i: i for i in range(2 if x.p is None else 3)} if in_place else {},
        warps=options.tiles.scores_warps,
        stages=options.tiles.scores_stages,
        interpret=options.interpret,
    )


def _score_gradients(
    x, values, from_states, units, gamma, factors, out, *, value_dim, block_v, options
):
    do_ref, dv_ref, error_ref = (y.data for y in values)
    precision, dtype = options.numerics.products, options.numerics.operands

    # loads that would stall after the loop
    log_mu, beta, eta = log_gate(x.log_mu, slice(None)), x.beta[...], x.eta[...]
    norm_q, norm_k = factors[FactorRow.NORM_Q, :], factors[FactorRow.NORM_K, :]
    gamma_read = gamma[...]

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        at = pl.ds(i * block_v, block_v)
        d_o, d_v, error = do_ref[:, at], dv_ref[:, at], error_ref[:, at]
        if units is not None:
            to_output, to_error = (units.columns[row, at][None, :] for row in (OUTPUT, ERROR))
            d_o = (d_o.astype(jnp.float32) * to_output).astype(error.dtype)
            d_v *= to_error.astype(d_v.dtype)
        return (
            carry[0] + dot(d_o, error.T, precision),
            carry[1] + dot(d_v, error.T, precision),
        )

    square = jnp.zeros((CHUNK, CHUNK), jnp.float32)
    by_output, by_error = lax.fori_loop(0, value_dim // block_v, step, (square, square))
    if units is not None:
        by_output *= units.unit[OUTPUT]
        by_error *= units.unit[ERROR]
    t, j = iotas()
    norm_p = norm_k if x.p is None else jnp.ones_like(norm_k)
    by_output = jnp.where(t >= j, by_output, 0.0) * norm_q[:, None] * norm_k[None, :]
    by_error = jnp.where(t > j, -by_error, 0.0) * norm_p[:, None] * norm_k[None, :]

    # in blocks of K where shared memory is short (float32)
    width = min(options.tiles.scores_block_k, x.q.shape[1])
    blocks = [pl.ds(first, width) for first in range(0, x.q.shape[1], width)]
    q, k = [x.q[:, block] for block in blocks], [x.k[:, block] for block in blocks]
    p = k if x.p is None else [x.p[:, block] for block in blocks]

    def products(rows: list[jax.Array]) -> jax.Array:
        return reduce(add, (dot(a, b.T, precision) for a, b in zip(rows, k, strict=True)))

    def operand(matrix: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        """In `dtype`, and its unit: float16 alone has too small a range for gradients."""
        if out.unit is None:
            return matrix.astype(dtype), 1.0
        tile, unit, _ = stored(matrix)
        return tile, unit

    for index, (ref, matrix) in enumerate(
        ((out.attention, by_output * products(q)), (out.overlap, by_error * products(p)))
    ):
        ref[...], unit = operand(matrix)
        if out.unit is not None:
            out.unit[index] = unit

    to_mu = jnp.cumsum(log_mu)
    exponents = jnp.minimum(to_mu[:, None] - to_mu[None, :], 0.0)
    w = jnp.where(t >= j, exp(exponents), 0.0)
    gamma_read = gamma_read.astype(jnp.float32)
    lifted = (
        gamma_read if x.p is None else exp(log_gate(x.log_alpha, slice(None)))[:, None] * gamma_read
    )
    eta = eta[None, :]
    by_output, output_unit = operand(by_output * (lifted + beta[:, None] * w) * eta)
    by_error = by_error * gamma_read * eta

    def store(
        ref: Leaf, gradients: list[jax.Array], keys: list[jax.Array], norm: jax.Array | None
    ) -> None:
        """Through the norm of the keys, which is `1 / norm`; None: not normalised."""
        if norm is not None and options.normalize:
            wide = [y.astype(jnp.float32) for y in keys]
            along = reduce(
                add, (jnp.sum(g * y, axis=1) for g, y in zip(gradients, wide, strict=True))
            )
            along *= norm * norm
            gradients = [g - y * along[:, None] for g, y in zip(gradients, wide, strict=True)]
        for block, gradient in zip(blocks, gradients, strict=True):
            ref[:, block] = gradient.astype(ref.dtype)

    def product(matrix: jax.Array, unit: jax.Array | float, keys: jax.Array) -> jax.Array:
        result = dot(matrix, keys, precision)
        return result if out.unit is None else result * unit

    def plus(
        ref: Leaf, matrix: jax.Array, unit: jax.Array | float, keys: list[jax.Array]
    ) -> list[jax.Array]:
        return [
            ref[:, block].astype(jnp.float32) + product(matrix, unit, y)
            for block, y in zip(blocks, keys, strict=True)
        ]

    # one gradient is stored before the next is begun: registers are short
    d_q = plus(from_states.q, by_output, output_unit, k)
    store(out.keys.q, d_q, q, norm_q * (1.0 / options.scale))
    d_k = plus(from_states.k, by_output.T, output_unit, q)
    if x.p is None:
        both, unit = operand(by_error + by_error.T)
        d_k = [d + product(both, unit, y) for d, y in zip(d_k, k, strict=True)]
    else:
        by_error, unit = operand(by_error)
        d_k = [d + product(by_error.T, unit, y) for d, y in zip(d_k, p, strict=True)]
    store(out.keys.k, d_k, k, norm_k)
    if x.p is not None:
        store(out.keys.p, plus(from_states.p, by_error, unit, k), p, None)
