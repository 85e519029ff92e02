"""Convolutions of queries, keys and values in one call, differentiable by hand."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
from jax import lax

from pallas_kernels.backends import triton_lacks
from pallas_kernels.short_convolution.backward import backward
from pallas_kernels.short_convolution.forward import forward
from pallas_kernels.short_convolution.types import MAX_TAPS, Branch, Options, Tiles
from pallas_kernels.tiling import SHARED_MEMORY

DTYPES = ("bfloat16", "float16", "float32")


def short_convolution(
    branches: tuple[Branch, ...],
    starts: jax.Array | None,
    *,
    joined: jax.Array | None = None,
    activation: bool = True,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Causal depthwise convolutions over time, and silu of each sum; the sums are float32.

    Differentiable in every array of the branches, reverse mode. The backward pass keeps the inputs
    alone. No tap reads across the start of a document, nor does what is not finite.

    Args:
      branches: one or more, of equal `B`, `T`, `W` and dtype; any `T` and any widths.
      starts: `[B, T]` bool, the first step of each document but a row's first; or None.
      joined: inputs of all branches along the channels, `[B, T, sum of C]`, as one product of
        matrices gives them; the branches have None there. They are read where they lie, and their
        gradient is one array.
      activation: False leaves out silu.
      tiles: None: those that ship.
      interpret: run the kernels in the interpreter, on any device.

    Returns:
      Outputs `[B, T, C]` of each branch, in x's dtype.
    """
    if starts is not None:
        starts = starts.astype(jnp.int8)
    # inside shard_map the gradient of what all devices share is summed by JAX, outside the kernels
    axes = [
        jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves((joined, branches, starts))
    ]
    varying = frozenset().union(*axes)

    def vary(x: jax.Array) -> jax.Array:
        missing = varying - jax.typeof(x).manual_axis_type.varying
        return lax.pcast(x, tuple(missing), to="varying") if missing else x

    joined, branches, starts = jax.tree.map(vary, (joined, branches, starts))
    options = Options(activation, tiles or Tiles(), interpret)
    return _convolve(options, joined, branches, starts)


def unsupported(x: jax.Array, taps: jax.Array, capability: tuple[int, int] | None) -> str | None:
    """Why a call cannot run on the kernels; None if it can.

    Args:
      x: inputs `[B, T, C]`.
      taps: `[W, C]`.
      capability: compute capability of the device; None for a device that is no CUDA GPU.
    """
    if capability is None:
        return "a CUDA GPU as the default device (or mdn_jax.ops.target_gpu), got none"
    if x.dtype.name not in DTYPES:
        return f"{', '.join(DTYPES)} inputs, got {x.dtype.name}"
    if any(map(jax.export.is_symbolic_dim, x.shape)):
        return f"sizes known when the call is traced, got {x.shape}"
    if taps.shape[0] > MAX_TAPS:
        return f"at most {MAX_TAPS} taps, got {taps.shape[0]}"
    if capability not in SHARED_MEMORY:
        known = ", ".join(f"{major}.{minor}" for major, minor in SHARED_MEMORY)
        return f"compute capability {known}, got {capability[0]}.{capability[1]}"
    return triton_lacks()


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(
    options: Options,
    joined: jax.Array | None,
    branches: tuple[Branch, ...],
    starts: jax.Array | None,
) -> tuple[jax.Array, ...]:
    return forward(joined, branches, starts, options)


Residuals = tuple[jax.Array | None, tuple[Branch, ...], jax.Array | None]


def _forward(
    options: Options,
    joined: jax.Array | None,
    branches: tuple[Branch, ...],
    starts: jax.Array | None,
) -> tuple[tuple[jax.Array, ...], Residuals]:
    return forward(joined, branches, starts, options), (joined, branches, starts)


def _backward(
    options: Options, residuals: Residuals, d_y: tuple[jax.Array, ...]
) -> tuple[jax.Array | None, tuple[Branch, ...], None]:
    return *backward(*residuals, d_y, options), None


_convolve.defvjp(_forward, _backward)
