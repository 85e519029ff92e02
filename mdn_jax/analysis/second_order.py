"""The momentum recurrence along a key as a second-order system (derivation: docs/stability.md).

With one key `k` and an erase key `p`, the rows `s = k^T S` and `m = k^T M` of the states obey

    [s_t, m_t] = A [s_(t-1), m_(t-1)] + [beta eta, -eta] v^T
    A = [[alpha - beta eta c, -beta mu], [eta c, mu]]        c = p . k, alpha unless given

for a key of length 1 (MDN, arXiv 2605.05838, writes it for `c = alpha`). Every function is
elementwise over the gates, which broadcast, works under `jax.jit`, and computes in the dtype that
they promote to: inside `jax.enable_x64(True)`, float64.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float


def transition(
    alpha: ArrayLike,
    mu: ArrayLike,
    beta: ArrayLike,
    eta: ArrayLike,
    *,
    erase: ArrayLike | None = None,
) -> Float[Array, "*g 2 2"]:
    """The matrix `A` of one step along the key.

    Args:
      alpha: decay, from 0 to 1.
      mu: momentum, from 0 to 1.
      beta: step size, at least 0.
      eta: write scale, at least 0.
      erase: `c`, the erase key times the key; None means `alpha`, the rule's default `p = alpha k`.
        1 for `p = k`.

    Returns:
      The matrices, `[..., 2, 2]`, in the order memory, momentum.
    """
    alpha, mu, beta, eta, erase = as_gates(alpha, mu, beta, eta, erase)
    rows = (alpha - beta * eta * erase, -beta * mu), (eta * erase, mu)
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def orthogonal_transition(
    alpha: ArrayLike, mu: ArrayLike, beta: ArrayLike
) -> Float[Array, "*g 2 2"]:
    """The matrix of one step along a direction orthogonal to both the key and the erase key.

    Nothing is written or erased there: the memory decays by `alpha`, is fed by what is left of the
    momentum, and the momentum decays by `mu`. Arguments as `transition`'s.
    """
    return transition(alpha, mu, beta, 0.0)


def eigenvalues(
    alpha: ArrayLike,
    mu: ArrayLike,
    beta: ArrayLike,
    eta: ArrayLike,
    *,
    erase: ArrayLike | None = None,
) -> Array:
    """Both eigenvalues of `transition`, complex.

    The discriminant is taken as the product that vanishes at both ends of the complex region, and
    of two real eigenvalues the smaller one from the product of both, `alpha mu`: neither cancels.

    Returns:
      `[..., 2]`, complex64 (complex128 for float64): the one of larger modulus first, of a complex
      pair that with a positive imaginary part.
    """
    alpha, mu, beta, eta, erase = as_gates(alpha, mu, beta, eta, erase)
    half = (alpha + mu - beta * eta * erase) / 2
    quarter = _discriminant(alpha, mu, beta * eta * erase) / 4
    root = jnp.sqrt(jnp.abs(quarter))
    large = half + jnp.where(half < 0, -root, root)
    small = jnp.where(large == 0, 0.0, alpha * mu / jnp.where(large == 0, 1.0, large))
    pair = quarter < 0
    first = jnp.where(pair, half, large) + 1j * jnp.where(pair, root, 0.0)
    second = jnp.where(pair, half, small) - 1j * jnp.where(pair, root, 0.0)
    return jnp.stack([first, second], axis=-1)


def spectral_radius(
    alpha: ArrayLike,
    mu: ArrayLike,
    beta: ArrayLike,
    eta: ArrayLike,
    *,
    erase: ArrayLike | None = None,
) -> Float[Array, "*g"]:
    """Largest modulus of the eigenvalues of `transition`: the factor per step in the long run.

    `sqrt(alpha mu)` where they are complex.
    """
    alpha, mu, beta, eta, erase = as_gates(alpha, mu, beta, eta, erase)
    half = (alpha + mu - beta * eta * erase) / 2
    quarter = _discriminant(alpha, mu, beta * eta * erase) / 4
    real = jnp.abs(half) + jnp.sqrt(jnp.maximum(quarter, 0.0))
    return jnp.where(quarter < 0, jnp.sqrt(alpha * mu), real)


def complex_region(
    alpha: ArrayLike, mu: ArrayLike
) -> tuple[Float[Array, "*g"], Float[Array, "*g"]]:
    """The ends of the open interval of `beta eta c` in which the eigenvalues are complex.

    `(sqrt(alpha) - sqrt(mu))^2` and `(sqrt(alpha) + sqrt(mu))^2`; at either end they are equal.
    """
    alpha, mu = jnp.asarray(alpha), jnp.asarray(mu)
    a, m = jnp.sqrt(alpha), jnp.sqrt(mu)
    one_is_zero = alpha * mu == 0  # then there is no interval, and both ends are exact
    low, high = (jnp.where(one_is_zero, alpha + mu, jnp.square(x)) for x in (a - m, a + m))
    return low, high


def is_oscillating(
    alpha: ArrayLike,
    mu: ArrayLike,
    beta: ArrayLike,
    eta: ArrayLike,
    *,
    erase: ArrayLike | None = None,
) -> Bool[Array, "*g"]:
    """Whether the eigenvalues of `transition` are a complex conjugate pair."""
    alpha, mu, beta, eta, erase = as_gates(alpha, mu, beta, eta, erase)
    return _discriminant(alpha, mu, beta * eta * erase) < 0


def half_life(factor: ArrayLike) -> Float[Array, "*g"]:
    """Steps after which something that is multiplied by `factor` at each of them has halved.

    `log(1/2) / log(factor)`: 0 for a factor of 0, inf for one of 1 or more.
    """
    factor = jnp.asarray(factor)
    safe = jnp.where(factor < 1, factor, 0.5)
    return jnp.where(factor < 1, jnp.log(0.5) / jnp.log(safe), jnp.inf)


def period(
    alpha: ArrayLike,
    mu: ArrayLike,
    beta: ArrayLike,
    eta: ArrayLike,
    *,
    erase: ArrayLike | None = None,
) -> Float[Array, "*g"]:
    """Steps of one oscillation, `2 pi / arg(lambda)` of the eigenvalue of larger modulus.

    inf where it is real and not negative; 2 where it is real and negative, which changes its sign
    at every step.
    """
    angle = jnp.angle(eigenvalues(alpha, mu, beta, eta, erase=erase)[..., 0])
    return jnp.where(angle > 0, 2 * jnp.pi / jnp.where(angle > 0, angle, 1.0), jnp.inf)


def damping_ratio(
    alpha: ArrayLike,
    mu: ArrayLike,
    beta: ArrayLike,
    eta: ArrayLike,
    *,
    erase: ArrayLike | None = None,
) -> Float[Array, "*g"]:
    """`r / sqrt(r^2 + phi^2)` of the eigenvalue `exp(-r + i phi)` of larger modulus.

    1 where nothing oscillates, near 0 where an oscillation barely decays, negative where it grows.
    """
    first = eigenvalues(alpha, mu, beta, eta, erase=erase)[..., 0]
    rate, angle = -jnp.log(jnp.abs(first)), jnp.angle(first)
    size = jnp.hypot(rate, angle)
    finite = jnp.isfinite(rate) & (size > 0)
    return jnp.where(finite, rate / jnp.where(finite, size, 1.0), 1.0)


def as_gates(*gates: ArrayLike | None) -> tuple[Array, ...]:
    """All of them as arrays of one shape and float dtype; the erase key's None is alpha."""
    alpha, mu, beta, eta, erase = gates
    arrays = [jnp.asarray(gates[0] if x is None else x) for x in (alpha, mu, beta, eta, erase)]
    dtype = jnp.result_type(float(0), *arrays)
    return tuple(jnp.broadcast_arrays(*(x.astype(dtype) for x in arrays)))


def _discriminant(alpha: Array, mu: Array, gain: Array) -> Array:
    """`trace^2 - 4 det`, zero at the ends of the complex region."""
    low, high = complex_region(alpha, mu)
    return (gain - low) * (gain - high)
