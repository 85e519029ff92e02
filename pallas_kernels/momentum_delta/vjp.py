"""The rule as one differentiable function: kernels forward and backward behind `custom_vjp`."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.momentum_delta.backward import local_gradient, retreat, state_gradients
from pallas_kernels.momentum_delta.forward import advance, output
from pallas_kernels.momentum_delta.gates import gate_gradients
from pallas_kernels.momentum_delta.prepare import prepare
from pallas_kernels.momentum_delta.scores import read_gamma, score_gradients
from pallas_kernels.momentum_delta.types import Memory, Options, Prepared, States, Tokens, Values
from pallas_kernels.momentum_delta.units import sums_with_errors, sums_with_states, whole

CHUNK_FACTORS = "mdn_chunk_factors"
"""Name of the residuals without states, for policies of `jax.checkpoint`.

`jax.checkpoint_policies.save_only_these_names(CHUNK_FACTORS)` keeps these and has the states, most
of the residuals, computed again by one kernel. `CHUNK_STATES` names the states.
"""
CHUNK_STATES = "mdn_chunk_states"


class Residuals(NamedTuple):
    """What the forward pass keeps, beside its inputs.

    Attributes:
      x: the inputs.
      prepared: three `[C, C]` matrices and `FACTORS` rows a chunk, float16 keys.
      error: of every step before its write.
      kept: one pair of states a chunk, the largest part.
      entered: `()` where a memory entered, None where none did.
    """

    x: Tokens
    prepared: Prepared
    error: Values
    kept: States
    entered: tuple[()] | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def rule(options: Options, x: Tokens, memory: Memory | None) -> tuple[jax.Array, Memory]:
    """The chunked rule for `T` a multiple of the chunk.

    Args:
      options: static.
      x: tokens and gates.
      memory: entering, float32; None stands for zeros.

    Returns:
      Outputs `[B, T, HV, V]` in v's dtype and the final memory, float32.
    """
    return _forward(options, x, memory)[0]


def _forward(
    options: Options, x: Tokens, memory: Memory | None
) -> tuple[tuple[jax.Array, Memory], Residuals]:
    prepared = prepare(x, options)
    prepared = jax.tree.map(lambda y: checkpoint_name(y, CHUNK_FACTORS), prepared)
    error, kept, final = advance(x, prepared, memory, options)
    error = jax.tree.map(lambda y: checkpoint_name(y, CHUNK_FACTORS), error)
    kept = jax.tree.map(lambda y: checkpoint_name(y, CHUNK_STATES), kept)
    o = output(x, prepared, error, kept, options)
    return (o, final), Residuals(x, prepared, error, kept, None if memory is None else ())


def _backward(
    options: Options, residuals: Residuals, cotangents: tuple[jax.Array, Memory]
) -> tuple[Tokens, Memory | None]:
    x, prepared, error, kept, entered = residuals
    d_o, d_final = cotangents
    local = local_gradient(x, prepared, d_o, options)
    d_v, d_kept, d_memory = retreat(x, prepared, d_o, local, d_final, options)
    values = (Values(d_o, local.of_outputs), d_v, error)
    units = sums_with_states(d_v, error, kept, d_kept)
    from_states = state_gradients(x, prepared, values, kept, d_kept, units, options)
    # XLA would make the following before, at the time of the largest need for memory
    factors, values, from_states = lax.optimization_barrier((prepared.factors, values, from_states))
    units, gamma = sums_with_errors(*values), read_gamma(x, factors, options)
    scores = score_gradients(x, prepared, values, from_states.keys, units, gamma, options)
    d_gates = gate_gradients(x, prepared, from_states.rows, scores, options)
    # and convert d_v before the kernels that read it
    d_v, (d_q, d_k, d_p) = lax.optimization_barrier((values[1], scores.keys))
    d_x = Tokens(
        q=_sum_groups(d_q, x.q),
        k=_sum_groups(d_k, x.k),
        v=whole(d_v, x.v.dtype),
        p=None if d_p is None or x.p is None else _sum_groups(d_p, x.p),
        **d_gates._asdict(),
    )
    return d_x, None if entered is None else d_memory


def _sum_groups(gradient: jax.Array, like: jax.Array) -> jax.Array:
    """`[B, T, HV, K]` to the heads of `like`, added in float32."""
    if gradient.shape == like.shape:
        return gradient
    grouped = gradient.reshape(*like.shape[:3], -1, like.shape[3])
    return grouped.astype(jnp.float32).sum(axis=3).astype(like.dtype)


rule.defvjp(_forward, _backward)
