"""Projections: with float32 outputs of low-precision activations; several in one product."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_jvp
def wide_projection(x: Float[Array, "*B I"], kernel: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    """`x @ kernel` in `x`'s dtype with an output that is not rounded to it.

    The derivative is that of the ordinary product in `x`'s dtype: the cotangent is rounded to it
    first, so that the backward pass multiplies in that dtype too and makes no float32 copy of `x`.

    Args:
      x: activations in the compute dtype.
      kernel: weights, any float dtype, rounded to `x`'s.

    Returns:
      The product, float32 (float64 for float64 `x`).
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=wide)


@wide_projection.defjvp
def _wide_projection_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    x, kernel = primals
    dx, dkernel = tangents
    y = wide_projection(x, kernel)
    dy = dx @ kernel.astype(x.dtype) + x @ dkernel.astype(x.dtype)
    return y, dy.astype(y.dtype)


def joined_projection(
    x: Float[Array, "*B I"], *kernels: Float[Array, "I _"]
) -> Float[Array, "*B _"]:
    """`x` times several matrices in one product, and in one each for the gradients.

    Args:
      x: activations in the compute dtype.
      *kernels: weights, any float dtype, rounded to `x`'s.

    Returns:
      The outputs one after the other along the last axis, in `x`'s dtype.
    """
    return x @ jnp.concatenate([kernel.astype(x.dtype) for kernel in kernels], axis=1)


@jax.custom_vjp
def for_two(x: Float[Array, "*B I"]) -> tuple[Float[Array, "*B I"], Float[Array, "*B I"]]:
    """`x` for one product and for others; their gradients are summed before the one's is added.

    Where all of them are sums of products, XLA adds the last one's in the product itself only if
    the others' sum is no product, too. Reverse mode alone.
    """
    return x, x


def _for_two_forward(x: Array) -> tuple[tuple[Array, Array], None]:
    return (x, x), None


def _for_two_backward(_: None, gradients: tuple[Array, Array]) -> tuple[Array]:
    one, others = gradients
    return (one + jax.lax.optimization_barrier(others),)


for_two.defvjp(_for_two_forward, _for_two_backward)


def wide_projections(
    x: Float[Array, "*B I"], kernels: Sequence[Float[Array, "I O"]]
) -> list[Float[Array, "*B O"]]:
    """`wide_projection` of each kernel, in one product that reads `x` once.

    Columns of the kernels alternate, so that one device's columns of each, where heads are cut over
    devices, are its columns of the product.
    """
    joined = jnp.stack(kernels, axis=-1)  # [I, O, kernels]
    y = wide_projection(x, joined.reshape(joined.shape[0], -1))
    y = y.reshape(*x.shape[:-1], *joined.shape[1:])
    return [y[..., i] for i in range(len(kernels))]
