"""What keeps values of one document that are not finite out of the others.

A document that starts multiplies what came before by factors of exactly zero, and zero times nan is
nan. So where such a factor stands the kernels select zero. Finite numbers stay as they are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def keeps_nothing(decay: jax.Array, lead: jax.Array, momentum: jax.Array) -> jax.Array:
    """Whether a chunk keeps exactly nothing of the states before it: a document starts there."""
    return (decay == 0) & (lead == 0) & (momentum == 0)


def unless(
    starts: jax.Array, x: jax.Array, otherwise: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`x`, or `otherwise(x)` where a document starts: a branch, which most chunks do not take."""
    return lax.cond(starts, otherwise, lambda x: x, x)


def finite(x: jax.Array) -> jax.Array:
    """`x`, with zero for what is not finite."""
    return jnp.where(jnp.abs(x) < jnp.inf, x, 0.0)


def clean(x: jax.Array, dead: jax.Array) -> jax.Array:
    """`x`, with zero for what is not finite where `dead`: a factor of zero stands before it."""
    return jnp.where(dead & ~(jnp.abs(x) < jnp.inf), 0.0, x)


def times(factor: jax.Array, x: jax.Array) -> jax.Array:
    """`factor * x`, zero for a factor of zero whatever `x` is."""
    return jnp.where(factor == 0, 0.0, factor * x)
