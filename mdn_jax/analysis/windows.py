"""Gates that change from step to step: products of the steps' matrices, impulse responses.

A product of matrices whose eigenvalues are all below 1 in modulus can grow all the same; what
bounds the states over a window is the norm of the product (docs/stability.md).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mdn_jax.analysis.second_order import as_gates, transition


def spectral_norm(matrices: Float[Array, "*g 2 2"]) -> Float[Array, "*g"]:
    """Largest singular value of real 2 by 2 matrices, from sums alone."""
    a, b, c, d = (matrices[..., i, j] for i in (0, 1) for j in (0, 1))
    return (jnp.hypot(a + d, b - c) + jnp.hypot(a - d, b + c)) / 2


def window_products(
    matrices: Float[Array, "*g T 2 2"], window: int
) -> Float[Array, "*g T-window+1 2 2"]:
    """Products over all windows, `A_(t+window-1) ... A_(t+1) A_t`, in `O(T log window)`.

    Args:
      matrices: of every step, `[..., T, 2, 2]`.
      window: steps in a window.

    Raises:
      ValueError: a window that is not from 1 to T, or matrices of another shape.
    """
    if matrices.ndim < 3 or matrices.shape[-2:] != (2, 2):
        raise ValueError(f"matrices: expected [..., T, 2, 2], got {list(matrices.shape)}")
    length = matrices.shape[-3]
    if not 1 <= window <= length:
        raise ValueError(f"window: expected an int from 1 to T = {length}, got {window!r}")
    if window == 1:
        return matrices
    half = window // 2
    products, count = window_products(matrices, half), length - 2 * half + 1
    products = _steps(products, half, count) @ _steps(products, 0, count)
    if window % 2:
        count -= 1
        products = _steps(matrices, window - 1, count) @ _steps(products, 0, count)
    return products


def window_growth(matrices: Float[Array, "*g T 2 2"], window: int) -> Float[Array, "*g T-window+1"]:
    """Largest factor by which a window's steps can scale the norm of the two states.

    The spectral norm of `window_products`, which see; above 1 the states can grow over the window.
    """
    return spectral_norm(window_products(matrices, window))


def impulse_response(
    alpha: ArrayLike,
    mu: ArrayLike,
    beta: ArrayLike,
    eta: ArrayLike,
    *,
    erase: ArrayLike | None = None,
) -> Float[Array, "*g T 2"]:
    """The states along the key after the value 1 at the first step and 0 at all others.

    Args:
      alpha: decay of every step, `[..., T]`.
      mu: momentum, likewise.
      beta: step size, likewise.
      eta: write scale, likewise.
      erase: see `second_order.transition`.

    Returns:
      Memory and momentum after each step, `[..., T, 2]`, from states of zero.

    Raises:
      ValueError: gates without an axis of steps.
    """
    alpha, mu, beta, eta, erase = as_gates(alpha, mu, beta, eta, erase)
    if alpha.ndim == 0:
        raise ValueError("alpha: expected [..., T], got a scalar")
    steps = jnp.moveaxis(transition(alpha, mu, beta, eta, erase=erase), -3, 0)  # [T, ..., 2, 2]
    first = jnp.stack([beta[..., 0] * eta[..., 0], -eta[..., 0]], axis=-1)

    def step(state: Array, matrix: Array) -> tuple[Array, Array]:
        state = jnp.einsum("...ij,...j->...i", matrix, state, precision=lax.Precision.HIGHEST)
        return state, state

    _, rest = lax.scan(step, first, steps[1:])
    return jnp.moveaxis(jnp.concatenate([first[None], rest]), 0, -2)


def _steps(x: Array, start: int, count: int) -> Array:
    return jax.lax.slice_in_dim(x, start, start + count, axis=x.ndim - 3)
