"""The four gates of the momentum delta rule, of MDN and of Titans."""

import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mdn_jax.layers.initializers import log_uniform, rate_bias
from mdn_jax.layers.projection import wide_projections
from mdn_jax.layers.stable_gates import (
    LEAST_DECAY,
    largest_beta,
    stability_margin,
    start_bias,
)
from mdn_jax.ops.coefficients import LOG_ZERO

if TYPE_CHECKING:
    from mdn_jax.models.config import Bound


class Gates(NamedTuple):
    """Gates of every step and value head, float32 (float64 for float64 inputs).

    Attributes:
      log_alpha: log of the decay (nats), at most 0; as published at most `log cos^2(theta)`.
      log_mu: log of the momentum (nats), at most 0.
      beta: step size, from 0 to 2; as published at most `sin^2(theta)`, so at most `1 - alpha`.
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

    This is `bound="published"`. "alpha" and "beta" keep `cos^2` or `sin^2` alone, "none" neither:
    the paper's ablations. "stable" takes the region of stability in their place, in which both are
    free (docs/stability.md, section 8), with `c = alpha`, or 1 for an erase key without it:

        log_alpha = -exp(a_log) softplus(a_proj x + dt_bias)
        beta      = sigmoid(b_proj x + b_bias) min((1 - margin) (1 + alpha) (1 + mu) / (eta c), 2)

    Its `log_mu` is lower by 2^-16, so that `mu < 1`. `b_bias`, which it has where the others have
    `log_factor`, starts so that `beta = 1 - mu` at an input of zero.

    Args:
      hidden_size: width of the input.
      heads: value heads; every parameter has one entry, or one column, for each.
      min_log_mu: lower bound of `log_mu` (nats) or None.
      tau_factor: see `eta`.
      use_momentum: False: a momentum of zero, without parameters.
      bound: of `alpha` and `beta`.
      erase_by_alpha: whether the erase key is `alpha k`, otherwise `k`; "stable" asks.
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
        bound: "Bound" = "published",
        erase_by_alpha: bool = True,
        initializer_range: float = 0.02,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.min_log_mu = min_log_mu
        self.tau = math.sqrt(hidden_size / tau_factor)
        self.bound = bound
        self.erase_by_alpha = erase_by_alpha
        self.dtype = dtype
        self.margin = stability_margin(dtype)
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
        log_factor = log_uniform(rngs.params(), heads, 4.0, param_dtype)
        bias = rate_bias(rngs.params(), heads, param_dtype)
        self.mu_bias: nnx.Param[Array] | None
        if use_momentum:  # published: both start from the same draw
            self.mu_bias = nnx.Param(jnp.copy(bias))
        else:
            self.mu_bias = None
        self.dt_bias = nnx.Param(bias)
        self.log_factor: nnx.Param[Array] | None
        self.b_bias: nnx.Param[Array] | None
        if bound == "stable":
            zero = jnp.zeros((heads,), jnp.promote_types(param_dtype, jnp.float32))
            start = start_bias(
                log_alpha=-self._decay(zero),
                log_mu=self._log_mu(zero) - LEAST_DECAY,
                erase_by_alpha=erase_by_alpha,
                margin=self.margin,
            )
            self.b_bias = nnx.Param(start.astype(param_dtype))
            self.log_factor = None
        else:
            self.b_bias = None
            self.log_factor = nnx.Param(log_factor)

    def __call__(self, x: Float[Array, "B T hidden"]) -> Gates:
        """The gates of every step of `x`."""
        x = x.astype(self.dtype)
        kernels = [self.a_proj[...], self.b_proj[...], self.e_proj[...]]
        if self.m_proj is not None:
            kernels.append(self.m_proj[...])
        a, b, e, *m = wide_projections(x, kernels)  # [B, T, HV]
        log_mu = self._log_mu(m[0] if m else a)
        eta = 1.0 + jnp.tanh(e / self.tau)
        log_alpha = -self._decay(a)
        if self.b_bias is not None:
            log_mu -= LEAST_DECAY
            alpha = jnp.exp(log_alpha)
            erase = alpha if self.erase_by_alpha else 1.0
            most = largest_beta(alpha, jnp.exp(log_mu), eta, erase, self.margin)
            beta = jax.nn.sigmoid(b + _like(self.b_bias, b)) * most
            return Gates(log_alpha=log_alpha, log_mu=log_mu, beta=beta, eta=eta)
        assert self.log_factor is not None
        tan2 = jnp.square(eta * jnp.exp(_like(self.log_factor, a)))
        beta = jax.nn.sigmoid(b)
        if self.bound in ("published", "beta"):
            beta *= tan2 / (1.0 + tan2)  # sin^2 = tan^2 / (1 + tan^2)
        if self.bound in ("published", "alpha"):
            log_alpha -= jnp.log1p(tan2)  # cos^2 = 1 / (1 + tan^2)
        return Gates(log_alpha=log_alpha, log_mu=log_mu, beta=beta, eta=eta)

    def _decay(self, a: Float[Array, "*B HV"]) -> Float[Array, "*B HV"]:
        """Nats a step, without the published bound."""
        return jnp.exp(_like(self.a_log, a)) * jax.nn.softplus(a + _like(self.dt_bias, a))

    def _log_mu(self, m: Float[Array, "*B HV"]) -> Float[Array, "*B HV"]:
        """Of the projection `m`, which only its shape and dtype matter of without momentum."""
        if self.mu_log is None or self.mu_bias is None:
            return jnp.full_like(m, LOG_ZERO)
        log_mu = -jnp.exp(_like(self.mu_log, m)) * jax.nn.softplus(m + _like(self.mu_bias, m))
        return log_mu if self.min_log_mu is None else jnp.maximum(log_mu, self.min_log_mu)


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
        kernels = [self.a_proj[...], self.m_proj[...], self.e_proj[...]]
        a, m, e = wide_projections(x.astype(self.dtype), kernels)  # [B, T, HV]

        def decay(x: Array, rate: nnx.Param[Array], bias: nnx.Param[Array]) -> Array:
            return -jnp.exp(_like(rate, x)) * jax.nn.softplus(x + _like(bias, x))

        return Gates(
            log_alpha=decay(a, self.a_log, self.dt_bias),
            log_mu=decay(m, self.mu_log, self.mu_bias),
            beta=jnp.ones_like(a),
            eta=jax.nn.sigmoid(e),
        )


def _like(parameter: nnx.Param[Array], x: Array) -> Array:
    return parameter[...].astype(x.dtype)
