"""The momentum delta rule on the GPU (docs/kernels.md)."""

from pallas_kernels.momentum_delta.api import momentum_delta, replay_step
from pallas_kernels.momentum_delta.decode import MAX_STEPS
from pallas_kernels.momentum_delta.numerics import Numerics
from pallas_kernels.momentum_delta.replay import Ring
from pallas_kernels.momentum_delta.types import CHUNK, Memory, Options, States, Tokens
from pallas_kernels.momentum_delta.vjp import CHUNK_FACTORS, CHUNK_STATES

__all__ = [
    "CHUNK",
    "CHUNK_FACTORS",
    "CHUNK_STATES",
    "MAX_STEPS",
    "Memory",
    "Numerics",
    "Options",
    "Ring",
    "States",
    "Tokens",
    "momentum_delta",
    "replay_step",
]
