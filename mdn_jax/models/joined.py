"""Matrices of one input joined before a loop of single tokens, whose products then are one.

XLA for GPUs makes one product of several of the same input, and concatenates their matrices where
the products are: in every turn of a loop. It pads the output projection there, too.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mdn_jax.layers.sharding import partitioned
from mdn_jax.models.causal_lm import MDNForCausalLM
from mdn_jax.ops import api

_OF_MIXER = ("q_proj", "k_proj", "v_proj", "g_proj")
_OF_MLP = ("gate_proj", "up_proj")
_WHOLE = 8
"""Tensor cores take 16-bit matrices with a multiple of so many columns."""


class Columns(nnx.Module):
    """Some columns of a product with several matrices, which XLA makes once for all of them.

    Args:
      matrices: joined, in the dtype of the computation.
      start: first column.
      stop: behind the last.
    """

    def __init__(self, matrices: nnx.Param[Array], start: int, stop: int):
        self.matrices, self.start, self.stop = matrices, start, stop

    @property
    def kernel(self) -> Float[Array, "I O"]:
        """The columns' own matrix."""
        return self.matrices[...][:, self.start : self.stop]

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Their part of the product."""
        matrices = self.matrices[...]
        return (x.astype(matrices.dtype) @ matrices)[..., self.start : self.stop]


def joins() -> bool:
    """Whether joining is of use here: on a GPU, where no mesh cuts the matrices."""
    return api._capability() is not None and max(partitioned().values(), default=1) == 1


def with_joined_products(model: MDNForCausalLM) -> MDNForCausalLM:
    """A copy of a model whose layers multiply once with the matrices of one input.

    For single tokens: it takes the matrices' bytes once more.
    """
    copy: MDNForCausalLM = nnx.merge(*nnx.split(model))
    for block in copy.layers:
        _join(block.mixer, _OF_MIXER)
        if block.mlp is not None:
            _join(block.mlp, _OF_MLP)
    return copy


def _join(layer: nnx.Module, names: tuple[str, ...]) -> None:
    """Puts `Columns` in place of a layer's projections."""
    there = [name for name in names if _is_plain(getattr(layer, name, None))]
    if len(there) < 2:
        return
    kernels = [getattr(layer, name).kernel[...] for name in there]
    dtype = getattr(layer, there[0]).dtype or kernels[0].dtype
    matrices = nnx.Param(jnp.concatenate([x.astype(dtype) for x in kernels], axis=1))
    start = 0
    for name, kernel in zip(there, kernels, strict=True):
        setattr(layer, name, Columns(matrices, start, start + kernel.shape[1]))
        start += kernel.shape[1]


def _is_plain(projection: object) -> bool:
    return isinstance(projection, nnx.Linear) and projection.bias is None


def whole_output(model: MDNForCausalLM) -> Float[Array, "hidden columns"]:
    """The output projection in the dtype of the computation, with columns of zeros behind it."""
    kernel = model.output_kernel().astype(model.dtype)
    return jnp.pad(kernel, ((0, 0), (0, -kernel.shape[1] % _WHOLE)))
