"""The rule as one differentiable function: kernels forward and backward behind `custom_vjp`."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.momentum_delta.block_scaling import (
    dequantize,
    scales_with_states,
    scales_with_v_new,
)
from pallas_kernels.momentum_delta.dv_local_bwd import dv_local_bwd
from pallas_kernels.momentum_delta.gate_bwd import gate_bwd
from pallas_kernels.momentum_delta.inter_chunk_bwd import inter_chunk_bwd
from pallas_kernels.momentum_delta.intra_chunk_bwd import intra_chunk_bwd
from pallas_kernels.momentum_delta.intra_chunk_fwd import intra_chunk_fwd
from pallas_kernels.momentum_delta.output_fwd import output_fwd
from pallas_kernels.momentum_delta.pieces import state_bwd_in_pieces, state_fwd_in_pieces
from pallas_kernels.momentum_delta.recompute_gamma import recompute_gamma
from pallas_kernels.momentum_delta.state_bwd import StateGradients
from pallas_kernels.momentum_delta.stretch import state_bwd_of_stretch, state_fwd_of_stretch
from pallas_kernels.momentum_delta.types import (
    CHUNK_FACTORS,
    CHUNK_STATES,
    IntraChunk,
    Leaf,
    Memory,
    Options,
    States,
    Tokens,
    Values,
)


class Residuals(NamedTuple):
    """What the forward pass keeps, beside its inputs.

    Attributes:
      x: the inputs.
      intra: two `[C, C]` matrices and 13 rows a chunk, float16 keys.
      v_new: V' of every step.
      states: one pair a chunk, the largest part.
      phi: of rows in pieces, what the states become over each piece between the first and the last;
        of stretches, over each piece.
      seams: of stretches.
      entered: `()` where a memory entered, None where none did.
    """

    x: Tokens
    intra: IntraChunk
    v_new: Values
    states: States
    phi: Leaf | None
    seams: Leaf | None
    entered: tuple[()] | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def rule(
    options: Options, x: Tokens, memory: Memory | None, seams: Leaf | None
) -> tuple[jax.Array, Memory]:
    """The chunked rule for `T` a multiple of the chunk.

    Args:
      options: static.
      x: tokens and gates.
      memory: entering, float32; None stands for zeros. Of stretches: what enters the whole row, and
        its gradient on each is that of what enters the stretch.
      seams: of stretches, for `options.exchange`.

    Returns:
      Outputs `[B, T, HV, V]` in v's dtype and the final memory, float32.
    """
    return _forward(options, x, memory, seams)[0]


def _forward(
    options: Options, x: Tokens, memory: Memory | None, seams: Leaf | None
) -> tuple[tuple[jax.Array, Memory], Residuals]:
    intra = intra_chunk_fwd(x, options)
    intra = jax.tree.map(lambda y: checkpoint_name(y, CHUNK_FACTORS), intra)
    if options.exchange is None:
        (v_new, states, final), phi = state_fwd_in_pieces(x, intra, memory, options)
    else:
        assert memory is not None
        (v_new, states, final), phi = state_fwd_of_stretch(x, intra, memory, seams, options)
    v_new = jax.tree.map(lambda y: checkpoint_name(y, CHUNK_FACTORS), v_new)
    states, phi = jax.tree.map(lambda y: checkpoint_name(y, CHUNK_STATES), (states, phi))
    o = output_fwd(x, intra, v_new, states, options)
    entered = None if memory is None else ()
    return (o, final), Residuals(x, intra, v_new, states, phi, seams, entered)


def _backward(
    options: Options, residuals: Residuals, cotangents: tuple[jax.Array, Memory]
) -> tuple[Tokens, Memory | None, None]:
    x, intra, v_new, states, phi, seams, entered = residuals
    d_o, d_final = cotangents
    local = dv_local_bwd(x, intra, d_o, options)
    passed: StateGradients
    if options.exchange is None:
        passed = state_bwd_in_pieces(x, intra, d_o, local, d_final, phi, options)
    else:
        assert phi is not None
        passed = state_bwd_of_stretch(x, intra, d_o, local, d_final, phi, seams, options)
    d_v, d_states, d_memory = passed
    values = (Values(d_o, local.d_o_scale), d_v, v_new)
    scales = scales_with_states(d_v, v_new, states, d_states)
    inter = inter_chunk_bwd(x, intra, values, states, d_states, scales, options)
    # XLA would make the following before, at the time of the largest need for memory
    factors, values, inter = lax.optimization_barrier((intra.factors, values, inter))
    scales, gamma = scales_with_v_new(*values), recompute_gamma(x, factors, options)
    scores = intra_chunk_bwd(x, intra, values, inter.keys, scales, gamma, options)
    d_gates = gate_bwd(x, intra, inter.rows, scores, options)
    # and convert d_v before the kernels that read it
    d_v, (d_q, d_k, d_p) = lax.optimization_barrier((values[1], scores.keys))
    d_x = Tokens(
        q=_sum_groups(d_q, x.q),
        k=_sum_groups(d_k, x.k),
        v=dequantize(d_v, x.v.dtype),
        p=None if d_p is None or x.p is None else _sum_groups(d_p, x.p),
        **d_gates._asdict(),
    )
    return d_x, None if entered is None else d_memory, None


def _sum_groups(gradient: jax.Array, like: jax.Array) -> jax.Array:
    """`[B, T, HV, K]` to the heads of `like`, added in float32."""
    if gradient.shape == like.shape:
        return gradient
    grouped = gradient.reshape(*like.shape[:3], -1, like.shape[3])
    return grouped.astype(jnp.float32).sum(axis=3).astype(like.dtype)


rule.defvjp(_forward, _backward)
