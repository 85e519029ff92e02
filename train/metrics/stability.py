"""A guard on the recurrence during training: gates inside the stable region, states that stay."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mdn_jax import MDNForCausalLM
from mdn_jax.analysis import is_stable, record_layers, state_norms
from train.data import Batch
from train.optimizer import Params

GROWTH = 4.0
"""A state grows if its norm is more than this many times that of half a row before.

From zero, and written alike at every step, a momentum that forgets nothing grows linearly and a
memory that it feeds quadratically, four times from half of a row to its end; more is exponential.
"""


def make_stability(model: MDNForCausalLM) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """Builds the measurement of gates and states on the first row of a batch.

    A forward pass of its own over that row, read as one document, in two halves. Its cost is that
    of one row forward, whatever the batch; nothing is added to the step.

    Args:
      model: the model, shapes suffice; its own parameters are not used.

    Returns:
      Compiled function `(parameters, batch) -> metrics`: for every MDN layer `i`

        layers.i.unstable_heads  share of heads with a step outside the region in which constant
                                 gates are stable along the key (`mdn_jax.analysis.is_stable`)
        layers.i.growing_heads   share of heads whose memory or momentum ends the row with more
                                 than four times the norm of half way, or with nan
        layers.i.memory_norm     Frobenius norm of the memory at the row's end, mean over heads
        layers.i.momentum_norm   the same of the momentum
        layers.i.memory_growth   norm of the memory at the row's end over that of half way, in the
                                 head where it is largest; inf with nan
        layers.i.momentum_growth the same of the momentum
        layers.i.fastest_head    the head of the larger of both
    """
    graph, _, *rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def stability(params: Params, batch: Batch) -> dict[str, jax.Array]:
        run = nnx.merge(graph, params, *rest)
        tokens = jnp.asarray(batch["tokens"])[:1]
        half = tokens.shape[1] // 2
        first, cache = record_layers(run, tokens[:, :half])
        second, _ = record_layers(run, tokens[:, half:], cache=cache)
        metrics: dict[str, jax.Array] = {}
        for layer in first:
            metrics |= _layer_metrics(layer, first[layer], second[layer])
        return metrics

    return stability


def _layer_metrics(layer: int, first: Any, second: Any) -> dict[str, jax.Array]:
    stable = jnp.stack([_stable(record) for record in (first, second)]).all(0)  # [HV]
    before, after = state_norms(first.state), state_norms(second.state)
    kept = [y <= GROWTH * x for x, y in zip(before, after, strict=True)]  # False for nan
    grown = ~jnp.stack(kept).all(0)[0]
    growth = jnp.stack([_growth(x[0], y[0]) for x, y in zip(before, after, strict=True)])  # [2, HV]
    return {
        f"layers.{layer}.unstable_heads": jnp.mean(~stable),
        f"layers.{layer}.growing_heads": jnp.mean(grown),
        f"layers.{layer}.memory_norm": jnp.mean(after[0]),
        f"layers.{layer}.momentum_norm": jnp.mean(after[1]),
        f"layers.{layer}.memory_growth": jnp.max(growth[0]),
        f"layers.{layer}.momentum_growth": jnp.max(growth[1]),
        f"layers.{layer}.fastest_head": jnp.argmax(jnp.max(growth, axis=0)),
    }


def _growth(before: jax.Array, after: jax.Array) -> jax.Array:
    """Of norms, a head each; where one of them is not finite, inf."""
    growth = jnp.where(before == 0, 1.0, after / before)
    return jnp.where(jnp.isfinite(growth), growth, jnp.inf)


def _stable(record: Any) -> jax.Array:
    gates = record.gates
    values = jnp.exp(gates.log_alpha), jnp.exp(gates.log_mu), gates.beta, gates.eta
    return is_stable(*values, erase=record.erase).all((0, 1))
