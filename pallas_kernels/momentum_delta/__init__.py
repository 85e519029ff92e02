"""The momentum delta rule on the GPU (docs/kernels.md)."""

from pallas_kernels.momentum_delta.call import momentum_delta
from pallas_kernels.momentum_delta.layout import CHUNK, Options, States, Tokens

__all__ = ["CHUNK", "Options", "States", "Tokens", "momentum_delta"]
