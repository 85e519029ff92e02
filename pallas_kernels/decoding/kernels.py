"""The kernels of a step by themselves, for benchmarks and tests."""

from pallas_kernels.decoding.head import logits
from pallas_kernels.decoding.mixer import Mixed, mixer
from pallas_kernels.decoding.mlp import down, up
from pallas_kernels.decoding.output import output
from pallas_kernels.decoding.projections import Projected, projections

__all__ = ["Mixed", "Projected", "down", "logits", "mixer", "output", "projections", "up"]
