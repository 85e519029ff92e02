"""The recurrent state of the momentum delta rule."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class MDNState(NamedTuple):
    """Memory and momentum of every value head; a pytree.

    Attributes:
      s: the memory ``S``, `[B, HV, K, V]`, float32 (float64 for float64 inputs).
      m: the momentum ``M`` with the sign of ``M = mu M + eta k w^T``, same shape and dtype.
    """

    s: Float[Array, "B HV K V"]
    m: Float[Array, "B HV K V"]

    @classmethod
    def zeros(
        cls,
        batch: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> "MDNState":
        """The state before the first token: zeros, in two buffers, so that it can be donated."""
        shape = (batch, heads, key_dim, value_dim)
        return cls(s=jnp.zeros(shape, dtype), m=jnp.zeros(shape, dtype))
