"""The published initialisation of the per-head parameters."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

_RATE_MIN, _RATE_MAX, _RATE_FLOOR = 1e-3, 1e-1, 1e-4


def log_uniform(
    key: PRNGKeyArray,
    heads: int,
    upper: float,
    dtype: jax.typing.DTypeLike,
    *,
    lower: float = 0.0,
) -> Float[Array, " HV"]:
    """`log U(lower, upper)`; the uniform excludes `lower`, so that the result is finite."""
    uniform = 1.0 - jax.random.uniform(key, (heads,))
    return jnp.log(lower + (upper - lower) * uniform).astype(dtype)


def rate_bias(key: PRNGKeyArray, heads: int, dtype: jax.typing.DTypeLike) -> Float[Array, " HV"]:
    """Bias whose softplus is log-uniform in [0.001, 0.1]: the rate of decay at input zero."""
    low, high = math.log(_RATE_MIN), math.log(_RATE_MAX)
    rate = jnp.exp(jax.random.uniform(key, (heads,), minval=low, maxval=high))
    rate = jnp.maximum(rate, _RATE_FLOOR)
    inverse_softplus = rate + jnp.log(-jnp.expm1(-rate))
    return inverse_softplus.astype(dtype)
