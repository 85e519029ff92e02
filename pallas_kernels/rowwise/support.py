"""What the kernels along rows run on."""

import jax
import jax.export

from pallas_kernels.backends import triton_lacks
from pallas_kernels.tiling import SHARED_MEMORY

DTYPES = ("bfloat16", "float16", "float32")


def unsupported(x: jax.Array, capability: tuple[int, int] | None) -> str | None:
    """Why a call on `x` cannot run on these kernels; None if it can.

    Args:
      x: the call's activations.
      capability: compute capability of the device; None for a device that is no CUDA GPU.
    """
    if capability not in SHARED_MEMORY:
        return f"compute capability {', '.join(map(str, SHARED_MEMORY))}, got {capability}"
    if x.dtype.name not in DTYPES:
        return f"{', '.join(DTYPES)} activations, got {x.dtype.name}"
    if any(map(jax.export.is_symbolic_dim, x.shape)):
        return f"sizes known when the call is traced, got {x.shape}"
    return triton_lacks()
