"""Momentum DeltaNet in JAX."""

from mdn_jax._version import __version__
from mdn_jax.layers import MomentumDeltaNet
from mdn_jax.models import MDNConfig, MDNForCausalLM, Sampling, generate
from mdn_jax.ops import MDNState, momentum_delta_rule
from mdn_jax.saved.load import load

__all__ = [
    "MDNConfig",
    "MDNForCausalLM",
    "MDNState",
    "MomentumDeltaNet",
    "Sampling",
    "__version__",
    "generate",
    "load",
    "momentum_delta_rule",
]
