"""Root mean square normalisation, plain and gated."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mdn_jax.layers.sharding import token_places
from mdn_jax.ops.rowwise import (
    GateActivation,
    Norm,
    normalized,
    on_kernels,
    rms_norm,
    rms_norm_and_input,
    rms_norm_down,
)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean x^2 + eps) * scale`, optionally times `activation(gate)`; float32 inside.

    Args:
      width: of the normalised axis, the last one.
      eps: inside the root.
      gate_activation: of the gate.
      kernels: the backward pass may be a GPU kernel; its derivatives are of the first order.
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
        kernels: bool = True,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.eps = eps
        self.gate_activation = gate_activation
        self.kernels = kernels
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))

    def __call__(
        self, x: Float[Array, "*B D"], gate: Float[Array, "*B D"] | None = None
    ) -> Float[Array, "*B D"]:
        """Normalises the last axis; `gate` is the argument of its activation."""
        if self.kernels and on_kernels(x):
            return rms_norm(self._norm, token_places(x), x, self.scale[...], gate)
        return _rms_norm(self._norm, x, self.scale[...], gate)

    def with_input(
        self, x: Float[Array, "*B D"]
    ) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
        """`x` normalised, and `x` itself for what reads it past the norm: one gradient of both."""
        if self.kernels and on_kernels(x):
            return rms_norm_and_input(self._norm, token_places(x), x, self.scale[...])
        return self(x), x

    def down(
        self,
        x: Float[Array, "B T HV V"],
        gate: Float[Array, "B T HV V"] | None,
        projection: nnx.Linear,
    ) -> Float[Array, "B T hidden"]:
        """The projection, without bias, of all heads' norms: on the kernels these are not kept."""
        if self.kernels and on_kernels(x):
            kernel, places = projection.kernel[...], token_places(x)
            return rms_norm_down(self._norm, places, x, self.scale[...], gate, kernel)
        return projection(self(x, gate).reshape(*x.shape[:2], -1))

    @property
    def _norm(self) -> Norm:
        return Norm(self.eps, self.gate_activation, jnp.dtype(self.dtype))


@partial(jax.checkpoint, static_argnums=(0,))  # keeps x and gate as they came, nothing wide
def _rms_norm(norm: Norm, x: Array, scale: Array, gate: Array | None) -> Array:
    return normalized(norm, x, scale, gate)
