"""Gates that are free within the region of stability (derivation: docs/stability.md, section 8)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mdn_jax.layers.initializers import inverse_softplus

LARGEST_BETA = 2.0
"""Of any gates: what the gated delta rule needs for an eigenvalue of -1."""

LEAST_DECAY = 2.0**-16
"""Nats that the momentum loses at every step at least: without any, a step that erases nothing adds
the same momentum to the memory again and again. Rounding of gates is far below it."""


class Start(NamedTuple):
    """Biases with which the stable gates start at the published ones, `[HV]` each, float32.

    Attributes:
      dt_bias: of `a_proj x`.
      b_bias: of `b_proj x`.
    """

    dt_bias: Float[Array, " HV"]
    b_bias: Float[Array, " HV"]


def stability_margin(dtype: jax.typing.DTypeLike) -> float:
    """How far below the edge the gates stay, as a part of it: what rounding can add to a gain.

    Args:
      dtype: of the keys. Those of 16 bits can become longer by half an epsilon each, so that the
        product of two grows by one; the gates are float32 at least.
    """
    return max(float(jnp.finfo(dtype).eps), LEAST_DECAY)


def largest_beta(
    alpha: Float[Array, "*g"],
    mu: Float[Array, "*g"],
    eta: Float[Array, "*g"],
    erase: Float[Array, "*g"] | float,
    margin: float,
) -> Float[Array, "*g"]:
    """`min((1 - margin) (1 + alpha) (1 + mu) / (eta c), 2)`, without a division by zero.

    Any `beta` from 0 to this one has `beta eta c < (1 + alpha) (1 + mu)`: the step is stable.

    Args:
      alpha: decay, from 0 to 1.
      mu: momentum, from 0 to 1.
      eta: write scale, at least 0.
      erase: `c`, the erase key times the key, at least 0.
      margin: from `stability_margin`.
    """
    edge = (1.0 - margin) * (1.0 + alpha) * (1.0 + mu)
    # where eta c is below a half the edge is at 2 or above, but for the margin
    return jnp.minimum(edge / jnp.maximum(eta * erase, 0.5), LARGEST_BETA)


def published_start(
    *,
    a_log: Float[Array, " HV"],
    dt_bias: Float[Array, " HV"],
    log_factor: Float[Array, " HV"],
    log_mu: Float[Array, " HV"],
    erase_by_alpha: bool,
    margin: float,
) -> Start:
    """The biases with which `alpha` and `beta` are the published ones at an input of zero.

    Args:
      a_log: as drawn.
      dt_bias: as drawn; the published bound `cos^2(theta)` is added to its decay.
      log_factor: as drawn; `theta = arctan(f)`, as `eta` starts at 1.
      log_mu: at an input of zero.
      erase_by_alpha: whether the erase key is `alpha k`; otherwise it is `k`.
      margin: from `stability_margin`.
    """
    a_log, dt_bias, log_factor, log_mu = (
        x.astype(jnp.float32) for x in (a_log, dt_bias, log_factor, log_mu)
    )
    rate, tan2 = jnp.exp(a_log), jnp.exp(2 * log_factor)
    decay = jnp.log1p(tan2) + rate * jax.nn.softplus(dt_bias)
    alpha = jnp.exp(-decay)
    erase = alpha if erase_by_alpha else 1.0
    most = largest_beta(alpha, jnp.exp(log_mu), jnp.ones_like(alpha), erase, margin)
    share = 0.5 * tan2 / (1.0 + tan2) / most  # at most a half: 0 < sin^2 < 1 <= most / (1 - margin)
    return Start(inverse_softplus(decay / rate), jnp.log(share) - jnp.log1p(-share))
