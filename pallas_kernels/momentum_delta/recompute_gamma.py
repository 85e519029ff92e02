"""Computes gamma_before again, for the backward pass: it is not kept from the forward pass.

Computes `gamma_before` (docs/algorithm.md, section 3) from the gates:

    inputs   log_alpha, log_mu, beta [B, T, HV] float32; factors (the first half's end)
    outputs  gamma_before [B, HV, NT, C, C] in the operands' dtype
    grid     flat, 2 halves x HV x NT x B: half a chunk a program

Why so: `intra_chunk_fwd` has it too. To compute it once more takes longer than to keep it, but the
forward pass is without its store, and the residuals without its memory. In `intra_chunk_bwd` itself
it would take registers that products need.

Constraints: one warp.

Run it alone: `python -m benchmarks stages --stages recompute_gamma`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.lowering import kernel_call
from pallas_kernels.momentum_delta.block_specs import ChunkSpecs
from pallas_kernels.momentum_delta.coefficients import (
    HalfEnd,
    across_halves,
    half_coefficients,
    log_gate,
)
from pallas_kernels.momentum_delta.rows import FactorRow
from pallas_kernels.momentum_delta.types import CHUNK, HALF, HALVES, Options, Tokens


def recompute_gamma(x: Tokens, factors: jax.Array, options: Options) -> jax.Array:
    """`gamma_before`, `[B, HV, NT, C, C]`.

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
            _recompute_gamma,
            half_of=specs.block,
            explicit_p=x.p is not None,
            precision=options.numerics.coefficients,
        ),
        (x.log_alpha, x.log_mu, x.beta),
        factors,
        name="mdn_recompute_gamma",
        grid=specs.grid,
        in_specs=[(gate, gate, gate), specs.factors()],
        out_specs=specs.matrix(),
        out_shape=z.per_chunk(CHUNK, CHUNK, dtype=dtype),
        warps=1,
        stages=1,
        interpret=options.interpret,
    )


def _recompute_gamma(gates, factors, out, *, half_of, explicit_p, precision):
    index = half_of(pl.program_id(0))
    first, second = HALVES
    own, other = pl.ds(index * HALF, HALF), pl.ds((1 - index) * HALF, HALF)
    log_alpha, log_mu, beta = gates
    half = half_coefficients(
        log_gate(log_alpha, own), log_gate(log_mu, own), beta[own], explicit_p, precision
    )
    out[own, own] = half.before.gamma.astype(out.dtype)
    # the second half sees the first by way of its end; the first sees nothing of the second
    end = HalfEnd(
        factors[FactorRow.FIRST_END, first],
        factors[FactorRow.FIRST_END, second],
        *(jnp.float32(0),) * 3,
    )
    decay, lead = factors[FactorRow.SECOND_HALF, first], factors[FactorRow.SECOND_HALF, second]
    seen = jnp.where(index == 1, across_halves(decay, lead, end).gamma, 0.0)
    out[own, other] = seen.astype(out.dtype)
