"""What the tests of the gated rules share: every rule over the same cases."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from mdn_jax.ops import (
    gated_delta_rule,
    gated_delta_rule_2,
    gated_linear_attention,
    kimi_delta_rule,
)
from mdn_jax.testing import GATE_REGIMES

RULES = {
    "gdn": gated_delta_rule,
    "comba": gated_delta_rule,
    "kda": kimi_delta_rule,
    "gdn2": gated_delta_rule_2,
    "mamba2": gated_linear_attention,
}
ARRAYS = ("q", "k", "v", "log_alpha", "beta", "b", "w", "p", "initial_state")


def random_call(
    rule,
    *,
    seed=0,
    batch=2,
    length=65,
    heads=2,
    value_heads=None,
    key_dim=12,
    value_dim=8,
    regime="layer",
    keys="random",
    dtype="float64",
    documents=1,
):
    """Random keyword arguments for a rule: gates of a regime of the momentum delta rule."""
    rng = np.random.default_rng(seed)
    value_heads = value_heads or heads
    wide = np.float64 if dtype == "float64" else np.float32
    q, k = rng.normal(size=(2, batch, length, heads, key_dim))
    if keys == "parallel":
        k = rng.normal(size=(batch, 1, heads, key_dim)) + 0.03 * k
    elif keys == "zero":
        q, k = (x * (rng.random((batch, length, heads, 1)) < 2 / 3) for x in (q, k))
    shape = (batch, length, value_heads)
    by_channel = rule in ("kda", "gdn2")
    decays = GATE_REGIMES[regime](rng, (*shape, key_dim) if by_channel else shape)["log_alpha"]
    inputs = {
        "q": jnp.asarray(q, dtype),
        "k": jnp.asarray(k / np.sqrt(key_dim) if rule == "mamba2" else k, dtype),
        "v": jnp.asarray(rng.normal(size=(*shape, value_dim)), dtype),
        "log_alpha": jnp.asarray(decays, wide),
        "beta": jnp.asarray(rng.random(shape), wide),
        "initial_state": jnp.asarray(
            0.3 * rng.normal(size=(batch, value_heads, key_dim, value_dim)), wide
        ),
    }
    if rule == "gdn2":
        del inputs["beta"]
        inputs["b"] = jnp.asarray(rng.random((*shape, key_dim)), wide)
        inputs["w"] = jnp.asarray(rng.random((*shape, value_dim)), wide)
    if rule == "comba":
        unit = k / np.sqrt((k**2).sum(-1, keepdims=True) + 1e-6)
        inputs["p"] = jnp.asarray(unit * rng.uniform(0.5, 1, (heads, 1)), dtype)
    if documents > 1:
        cuts = np.sort(rng.integers(0, length, (batch, documents - 1)), axis=1)
        ids = (np.arange(length)[None, :, None] >= cuts[:, None, :]).sum(-1)
        inputs["segment_ids"] = jnp.asarray(ids, jnp.int32)
    return inputs


@cache
def _outputs_and_gradients(rule, options):
    def run(inputs, cotangent):
        arrays = {name: x for name, x in inputs.items() if name in ARRAYS}
        fixed = {name: x for name, x in inputs.items() if name not in ARRAYS}
        outputs, pull = jax.vjp(lambda x: RULES[rule](**x, **fixed, **dict(options)), arrays)
        return outputs, pull(cotangent)[0]

    return jax.jit(run)


def outputs_and_gradients(rule, inputs, **options):
    """((o, state), gradients by name) for random cotangents of both outputs."""
    rng = np.random.default_rng(99)
    cotangent = tuple(
        jnp.asarray(rng.normal(size=inputs[name].shape), inputs[name].dtype)
        for name in ("v", "initial_state")
    )
    return _outputs_and_gradients(rule, tuple(sorted(options.items())))(inputs, cotangent)


@cache
def compiled(rule, implementation):
    """The rule as a compiled function of its arrays."""

    @jax.jit
    def run(inputs):
        return RULES[rule](**inputs, implementation=implementation)

    return run
