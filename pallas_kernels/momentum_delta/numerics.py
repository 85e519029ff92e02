"""Which dtypes and precisions the kernels of one call use: the one place that decides.

    inputs     asked for            capability   kernels get   operands   storage   products
    float32    -                    any          float32       float32    float32   3 x bfloat16
    16 bits    -                    any          as given      as given   float16   16 bits
    bfloat16   full precision       9.0 and up   bfloat16      float32    float32   in two parts
    bfloat16   full precision       below        float32       float32    float32   3 x bfloat16
    float16    full precision       any          float32       float32    float32   3 x bfloat16

Full precision is `jax.default_matmul_precision("highest")` or "float32".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lowering import PARTS, Precision


class Numerics(NamedTuple):
    """Dtypes and precisions of a call.

    Attributes:
      dtype: of q, k, v, p as the kernels get them.
      precise: of bfloat16 inputs: intermediates and products are float32.
      interpret: the kernels run in the interpreter, which knows no presets of dot products.
    """

    dtype: jnp.dtype
    precise: bool = False
    interpret: bool = False

    @classmethod
    def choose(
        cls,
        dtype: jax.typing.DTypeLike,
        *,
        full_precision: bool,
        capability: tuple[int, int] | None,
        interpret: bool = False,
    ) -> "Numerics":
        """What a call gets.

        Args:
          dtype: of the caller's q.
          full_precision: whether products of all digits of float32 are asked for.
          capability: compute capability of the device; None for no CUDA GPU.
          interpret: run the kernels in the interpreter.
        """
        dtype = jnp.dtype(dtype)
        if not full_precision or dtype.itemsize > 2:
            return cls(dtype, False, interpret)
        if can_be_precise(dtype, capability):
            return cls(dtype, True, interpret)
        return cls(jnp.dtype(jnp.float32), False, interpret)

    @property
    def operands(self) -> jnp.dtype:
        """Dtype of matrices inside a chunk and of products with keys."""
        return jnp.dtype(jnp.float32) if self.precise else self.dtype

    @property
    def storage(self) -> jnp.dtype:
        """Dtype of states, v_new and their gradients between the kernels.

        float16 has block scales (block_scaling.py).
        """
        return jnp.dtype(jnp.float32 if self.operands == jnp.float32 else jnp.float16)

    @property
    def scaled(self) -> bool:
        """Whether what is stored has block scales."""
        return self.storage == jnp.float16

    @property
    def exact(self) -> Precision:
        """Near-float32 products of float32 operands: three bfloat16 passes on the tensor cores.

        Plain TF32 is off by 2e-4, and TF32x3 is five times slower.
        """
        if self.interpret:
            return lax.Precision.HIGHEST
        return lax.DotAlgorithmPreset.BF16_BF16_F32_X3

    @property
    def products(self) -> Precision:
        """Precision of products of float32 operands with K or V columns."""
        return PARTS if self.precise else self.exact

    @property
    def coefficients(self) -> Precision:
        """Precision of float32 coefficients: TF32 where 16-bit operands cannot show more."""
        if self.interpret or self.operands == jnp.float32:
            return self.exact
        return lax.DotAlgorithmPreset.TF32_TF32_F32


def can_be_precise(dtype: jax.typing.DTypeLike, capability: tuple[int, int] | None) -> bool:
    """Whether kernels for 16-bit inputs of `dtype` can keep float32 between them."""
    return jnp.dtype(dtype) == jnp.bfloat16 and capability is not None and capability >= (9, 0)
