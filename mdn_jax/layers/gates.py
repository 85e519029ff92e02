"""The four gates of the momentum delta rule, of MDN and of Titans."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mdn_jax.layers.initializers import log_uniform, rate_bias
from mdn_jax.layers.projection import wide_projection
from mdn_jax.ops.coefficients import LOG_ZERO


class Gates(NamedTuple):
    """Gates of every step and value head, float32 (float64 for float64 inputs).

    Attributes:
      log_alpha: log of the decay (nats), at most `log cos^2(theta)`.
      log_mu: log of the momentum (nats), at most 0.
      beta: step size, between 0 and `sin^2(theta)`, so at most `1 - alpha`.
      eta: write scale, between 0 and 2.
    """

    log_alpha: Float[Array, "B T HV"]
    log_mu: Float[Array, "B T HV"]
    beta: Float[Array, "B T HV"]
    eta: Float[Array, "B T HV"]


class MomentumGates(nnx.Module):
    """Gates from the layer's input (MDN, arXiv 2605.05838).

        log_mu    = max(-exp(mu_log) softplus(m_proj x + mu_bias), min_log_mu)
        eta       = 1 + tanh(e_proj x / sqrt(hidden / tau_factor))
        theta     = arctan(eta exp(log_factor))
        beta      = sin^2(theta) sigmoid(b_proj x)
        log_alpha = log cos^2(theta) - exp(a_log) softplus(a_proj x + dt_bias)

    The bounds `sin^2` and `cos^2` and the momentum can be left out, as the paper's ablations do.

    Args:
      hidden_size: width of the input.
      heads: value heads; every parameter has one entry, or one column, for each.
      min_log_mu: lower bound of `log_mu` (nats) or None.
      tau_factor: see `eta`.
      use_momentum: False: a momentum of zero, without parameters.
      bound_alpha: False: `log_alpha` without `log cos^2(theta)`.
      bound_beta: False: `beta` without `sin^2(theta)`.
      initializer_range: standard deviation of the projections.
      dtype: of the projections' products; all else is float32 (float64 for float64).
      param_dtype: of the parameters.
      rngs: random keys for the initialisation, stream `params`.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        *,
        min_log_mu: float | None,
        tau_factor: float,
        use_momentum: bool = True,
        bound_alpha: bool = True,
        bound_beta: bool = True,
        initializer_range: float = 0.02,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.min_log_mu = min_log_mu
        self.tau = math.sqrt(hidden_size / tau_factor)
        self.bound_alpha = bound_alpha
        self.bound_beta = bound_beta
        self.dtype = dtype
        normal = jax.nn.initializers.normal(initializer_range)

        def projection() -> nnx.Param[Array]:
            return nnx.Param(normal(rngs.params(), (hidden_size, heads), param_dtype))

        self.a_proj = projection()
        self.b_proj = projection()
        self.m_proj = projection() if use_momentum else None
        self.e_proj = projection()
        self.a_log = nnx.Param(log_uniform(rngs.params(), heads, 16.0, param_dtype))
        self.mu_log: nnx.Param[Array] | None
        if use_momentum:
            self.mu_log = nnx.Param(log_uniform(rngs.params(), heads, 16.0, param_dtype))
        else:
            self.mu_log = None
        self.log_factor = nnx.Param(log_uniform(rngs.params(), heads, 4.0, param_dtype))
        bias = rate_bias(rngs.params(), heads, param_dtype)
        self.dt_bias = nnx.Param(bias)
        self.mu_bias: nnx.Param[Array] | None
        if use_momentum:  # published: both start from the same draw
            self.mu_bias = nnx.Param(jnp.copy(bias))
        else:
            self.mu_bias = None

    def __call__(self, x: Float[Array, "B T hidden"]) -> Gates:
        """The gates of every step of `x`."""
        x = x.astype(self.dtype)
        kernels = [self.a_proj[...], self.b_proj[...], self.e_proj[...]]
        if self.m_proj is not None:
            kernels.append(self.m_proj[...])
        projected = wide_projection(x, jnp.concatenate(kernels, axis=1))  # x is read once
        a, b, e, *m = jnp.split(projected, len(kernels), axis=-1)  # [B, T, HV]

        def wide(parameter: nnx.Param[Array]) -> Array:
            return parameter[...].astype(a.dtype)

        log_mu = jnp.full_like(a, LOG_ZERO)
        if self.mu_log is not None and self.mu_bias is not None:
            log_mu = -jnp.exp(wide(self.mu_log)) * jax.nn.softplus(m[0] + wide(self.mu_bias))
            if self.min_log_mu is not None:
                log_mu = jnp.maximum(log_mu, self.min_log_mu)
        eta = 1.0 + jnp.tanh(e / self.tau)
        tan2 = jnp.square(eta * jnp.exp(wide(self.log_factor)))
        beta = jax.nn.sigmoid(b)
        if self.bound_beta:
            beta *= tan2 / (1.0 + tan2)  # sin^2 = tan^2 / (1 + tan^2)
        decay = jnp.exp(wide(self.a_log)) * jax.nn.softplus(a + wide(self.dt_bias))
        log_alpha = -decay
        if self.bound_alpha:
            log_alpha -= jnp.log1p(tan2)  # cos^2 = 1 / (1 + tan^2)
        return Gates(log_alpha=log_alpha, log_mu=log_mu, beta=beta, eta=eta)


class TitansGates(nnx.Module):
    """Gates of Titans' memory as those of the momentum delta rule (arXiv 2501.00663).

        log_alpha = -exp(a_log) softplus(a_proj x + dt_bias)      the log of the paper's 1 - alpha
        log_mu    = -exp(mu_log) softplus(m_proj x + mu_bias)     the log of its eta
        eta       = sigmoid(e_proj x)                             its theta
        beta      = 1

    The paper makes them functions of the token, in [0, 1], and does not say which. These are those
    of MDN without its bounds, and start as they do.

    Args:
      hidden_size: width of the input.
      heads: value heads; every parameter has one entry, or one column, for each.
      initializer_range: standard deviation of the projections.
      dtype: of the projections' products; all else is float32 (float64 for float64).
      param_dtype: of the parameters.
      rngs: random keys for the initialisation, stream `params`.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        *,
        initializer_range: float = 0.02,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        normal = jax.nn.initializers.normal(initializer_range)

        def projection() -> nnx.Param[Array]:
            return nnx.Param(normal(rngs.params(), (hidden_size, heads), param_dtype))

        self.a_proj, self.m_proj, self.e_proj = projection(), projection(), projection()
        self.a_log = nnx.Param(log_uniform(rngs.params(), heads, 16.0, param_dtype))
        self.mu_log = nnx.Param(log_uniform(rngs.params(), heads, 16.0, param_dtype))
        bias = rate_bias(rngs.params(), heads, param_dtype)
        self.dt_bias, self.mu_bias = nnx.Param(bias), nnx.Param(jnp.copy(bias))

    def __call__(self, x: Float[Array, "B T hidden"]) -> Gates:
        """The gates of every step of `x`."""
        kernels = [self.a_proj[...], self.m_proj[...], self.e_proj[...]]  # x is read once
        projected = wide_projection(x.astype(self.dtype), jnp.concatenate(kernels, axis=1))
        a, m, e = jnp.split(projected, 3, axis=-1)  # [B, T, HV]

        def decay(x: Array, rate: nnx.Param[Array], bias: nnx.Param[Array]) -> Array:
            step = jax.nn.softplus(x + bias[...].astype(x.dtype))
            return -jnp.exp(rate[...].astype(x.dtype)) * step

        return Gates(
            log_alpha=decay(a, self.a_log, self.dt_bias),
            log_mu=decay(m, self.mu_log, self.mu_bias),
            beta=jnp.ones_like(a),
            eta=jax.nn.sigmoid(e),
        )
