"""Short causal depthwise convolutions on the GPU (docs/design.md)."""

from pallas_kernels.short_convolution.api import short_convolution, unsupported
from pallas_kernels.short_convolution.types import MAX_TAPS, MIN_STEPS, Branch, Tiles

__all__ = ["MAX_TAPS", "MIN_STEPS", "Branch", "Tiles", "short_convolution", "unsupported"]
