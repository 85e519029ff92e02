"""Where the second-order system is stable, and the bounds that the published layer keeps to."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from mdn_jax.analysis.second_order import as_gates


class PublishedBounds(NamedTuple):
    """Which of the bounds of the published layer hold, elementwise.

    Attributes:
      beta: `0 <= beta <= sin^2(theta)`.
      alpha: `0 <= alpha <= cos^2(theta)`.
      mu: `exp(min_log_mu) <= mu <= 1`.
    """

    beta: Bool[Array, "*g"]
    alpha: Bool[Array, "*g"]
    mu: Bool[Array, "*g"]

    @property
    def all(self) -> Bool[Array, "*g"]:
        """Whether all three hold."""
        return self.beta & self.alpha & self.mu


def stability_load(
    alpha: ArrayLike,
    mu: ArrayLike,
    beta: ArrayLike,
    eta: ArrayLike,
    *,
    erase: ArrayLike | None = None,
) -> Float[Array, "*g"]:
    """`beta eta c / ((1 + alpha) (1 + mu))`: how far a step is towards the edge of stability, 1.

    Arguments as of `second_order.transition`.
    """
    alpha, mu, beta, eta, erase = as_gates(alpha, mu, beta, eta, erase)
    return beta * eta * erase / ((1 + alpha) * (1 + mu))


def is_stable(
    alpha: ArrayLike,
    mu: ArrayLike,
    beta: ArrayLike,
    eta: ArrayLike,
    *,
    erase: ArrayLike | None = None,
) -> Bool[Array, "*g"]:
    """Whether the spectral radius of `second_order.transition` is below 1.

    For `alpha, mu < 1` and `beta, eta, c >= 0` that is `stability_load < 1`. At `alpha = 1` or
    `mu = 1` something has to be erased as well (`beta eta c > 0`), or an eigenvalue is 1; at both
    the eigenvalues' product is 1, and nothing is stable. (Jury's conditions.) nan is not stable.
    """
    alpha, mu, beta, eta, erase = as_gates(alpha, mu, beta, eta, erase)
    gain = beta * eta * erase
    bounded = alpha * mu < 1
    no_growth = (1 - alpha) * (1 - mu) + gain > 0
    no_overshoot = gain < (1 + alpha) * (1 + mu)
    return bounded & no_growth & no_overshoot


def published_bounds(
    alpha: ArrayLike,
    mu: ArrayLike,
    beta: ArrayLike,
    eta: ArrayLike,
    *,
    factor: ArrayLike,
    min_log_mu: float | None = None,
    tolerance: float = 0.0,
) -> PublishedBounds:
    """The bounds of the published layer as predicates (MDN, arXiv 2605.05838).

    With `theta = arctan(eta factor)`: `beta <= sin^2(theta)` and `alpha <= cos^2(theta)`, so that
    `beta <= 1 - alpha`.

    Args:
      alpha: decay.
      mu: momentum.
      beta: step size.
      eta: write scale.
      factor: `exp(log_factor)` of the layer, broadcast against the gates.
      min_log_mu: lower bound of log mu (nats); None means no bound.
      tolerance: relative, for gates that were rounded.

    Raises:
      ValueError: a negative tolerance or a `min_log_mu` above 0.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance: expected a number >= 0, got {tolerance!r}")
    if min_log_mu is not None and not min_log_mu <= 0:
        raise ValueError(f"min_log_mu: expected a number <= 0 or None, got {min_log_mu!r}")
    alpha, mu, beta, eta, factor = as_gates(alpha, mu, beta, eta, factor)
    tan2 = jnp.square(eta * factor)
    more = 1.0 + tolerance
    least = 0.0 if min_log_mu is None else jnp.exp(min_log_mu)
    return PublishedBounds(
        beta=(beta >= 0) & (beta <= more * tan2 / (1 + tan2)),
        alpha=(alpha >= 0) & (alpha <= more / (1 + tan2)),
        mu=(mu * more >= least) & (mu <= more),
    )
