"""What the operator's tests share."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from mdn_jax import MDNState, momentum_delta_rule

DIFFERENTIABLE = ("q", "k", "v", "log_alpha", "log_mu", "beta", "eta", "p", "initial_state")


def cotangents(inputs, seed=99):
    """Random cotangents of (o, state), so that every output carries gradient."""
    rng = np.random.default_rng(seed)
    v, k = inputs["v"], inputs["k"]
    wide = inputs["log_alpha"].dtype
    state = (v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])
    return (
        jnp.asarray(rng.normal(size=v.shape), v.dtype),
        MDNState(*(jnp.asarray(rng.normal(size=state), wide) for _ in range(2))),
    )


@cache
def _outputs_and_gradients(options):
    def run(inputs, cotangent):
        arrays = {name: inputs[name] for name in DIFFERENTIABLE if name in inputs}
        fixed = {name: x for name, x in inputs.items() if name not in arrays}
        outputs, pullback = jax.vjp(
            lambda x: momentum_delta_rule(**x, **fixed, **dict(options)), arrays
        )
        return outputs, pullback(cotangent)[0]

    return jax.jit(run)


def outputs_and_gradients(inputs, cotangent=None, **options):
    """((o, state), gradients by name) for random cotangents of every output."""
    run = _outputs_and_gradients(tuple(sorted(options.items())))
    return run(inputs, cotangents(inputs) if cotangent is None else cotangent)
