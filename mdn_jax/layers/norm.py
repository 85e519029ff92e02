"""Root mean square normalisation, plain and gated."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

GateActivation = Literal["sigmoid", "silu"]

_ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "silu": jax.nn.silu}


class RMSNorm(nnx.Module):
    """`x / sqrt(mean x^2 + eps) * scale`, optionally times `activation(gate)`; float32 inside.

    Args:
      width: of the normalised axis, the last one.
      eps: inside the root.
      gate_activation: of the gate.
      dtype: of the output.
      param_dtype: of `scale`, initially ones.
      rngs: unused: nothing is drawn.
    """

    def __init__(
        self,
        width: int,
        *,
        eps: float,
        gate_activation: GateActivation = "sigmoid",
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.eps = eps
        self.gate_activation = gate_activation
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))

    def __call__(
        self, x: Float[Array, "*B D"], gate: Float[Array, "*B D"] | None = None
    ) -> Float[Array, "*B D"]:
        """Normalises the last axis; `gate` is the argument of its activation."""
        return _rms_norm(x, self.scale[...], gate, self.eps, self.dtype, self.gate_activation)


@partial(jax.checkpoint, static_argnums=(3, 4, 5))  # keeps x and gate as they came, nothing wide
def _rms_norm(
    x: Array,
    scale: Array,
    gate: Array | None,
    eps: float,
    dtype: jax.typing.DTypeLike,
    activation: GateActivation,
) -> Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = x.astype(wide)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    y *= scale.astype(wide)
    if gate is not None:
        y *= _ACTIVATIONS[activation](gate.astype(wide))
    return y.astype(dtype)
