"""The MLP of a block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mdn_jax.layers.projection import joined_projection
from mdn_jax.layers.sharding import heads_are_cut, token_places
from mdn_jax.ops.context import varying
from mdn_jax.ops.rowwise import on_kernels, swiglu_down


class SwiGLU(nnx.Module):
    """`down_proj(silu(gate_proj x) * up_proj x)`.

    Args:
      hidden_size: width of input and output.
      width: width between.
      initializer_range: standard deviation of the weights.
      kernels: the backward pass may be a GPU kernel; its derivatives are of the first order.
      dtype: of the computation.
      param_dtype: of the parameters.
      rngs: random keys for the initialisation, stream `params`.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        *,
        initializer_range: float = 0.02,
        kernels: bool = True,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=False,
                kernel_init=jax.nn.initializers.normal(initializer_range),
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.kernels = kernels
        self.dtype = dtype
        self.gate_proj = linear(hidden_size, width)
        self.up_proj = linear(hidden_size, width)
        self.down_proj = linear(width, hidden_size)

    def __call__(self, x: Float[Array, "*B hidden"]) -> Float[Array, "*B hidden"]:
        """Applies the MLP to every position."""
        x = x.astype(self.dtype)
        if not (self.kernels and on_kernels(x)):
            return self.down_proj(_gated(self.gate_proj(x), self.up_proj(x)))
        if heads_are_cut():
            return _down(self.gate_proj(x), self.up_proj(x), self.down_proj.kernel[...])
        both = joined_projection(x, self.gate_proj.kernel[...], self.up_proj.kernel[...])
        return swiglu_down(token_places(both), *varying((both, self.down_proj.kernel[...])))


@jax.checkpoint  # makes the product of both again
def _down(gate: Array, up: Array, kernel: Array) -> Array:
    return (jax.nn.silu(gate) * up) @ kernel.astype(gate.dtype)


@jax.checkpoint  # keeps its two inputs
def _gated(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up
