"""Gates that are free within the region of stability (derivation: docs/stability.md, section 8)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LARGEST_BETA = 2.0
"""Of any gates: what the gated delta rule needs for an eigenvalue of -1."""

LEAST_DECAY = 2.0**-16
"""Nats that the momentum loses at every step at least: without any, a step that erases nothing adds
the same momentum to the memory again and again. Rounding of gates is far below it."""


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


def start_bias(
    *,
    log_alpha: Float[Array, " HV"],
    log_mu: Float[Array, " HV"],
    erase_by_alpha: bool,
    margin: float,
) -> Float[Array, " HV"]:
    """The bias of `b_proj x` with which `beta = 1 - mu` at an input of zero, where `eta = 1`.

    What a token corrects in the end, `beta eta (1 + mu + mu^2 + ...)`, is then 1, as with the delta
    rule's `beta = 1`: half of the edge for keys that come back after many others.

    Args:
      log_alpha: at an input of zero.
      log_mu: at an input of zero, below 0.
      erase_by_alpha: whether the erase key is `alpha k`; otherwise it is `k`.
      margin: from `stability_margin`.
    """
    alpha, mu = jnp.exp(log_alpha), jnp.exp(log_mu)
    erase = alpha if erase_by_alpha else 1.0
    most = largest_beta(alpha, mu, jnp.ones_like(alpha), erase, margin)
    share = -jnp.expm1(log_mu) / most
    return jnp.log(share) - jnp.log1p(-share)
