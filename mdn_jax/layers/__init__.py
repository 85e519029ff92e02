"""Flax NNX layers."""

from mdn_jax.layers.attention import AttentionCache, SoftmaxAttention
from mdn_jax.layers.gated import (
    Comba,
    GatedDeltaNet,
    GatedDeltaNet2,
    KimiDeltaAttention,
    Mamba2,
)
from mdn_jax.layers.mamba3 import Mamba3, Mamba3Cache
from mdn_jax.layers.momentum_deltanet import MDNCache, MomentumDeltaNet, TitansMemory
from mdn_jax.layers.replay_cache import ReplayCache
from mdn_jax.layers.sharding import mesh_axes
from mdn_jax.layers.state_mixer import StateCache

__all__ = [
    "AttentionCache",
    "Comba",
    "GatedDeltaNet",
    "GatedDeltaNet2",
    "KimiDeltaAttention",
    "MDNCache",
    "Mamba2",
    "Mamba3",
    "Mamba3Cache",
    "MomentumDeltaNet",
    "ReplayCache",
    "SoftmaxAttention",
    "StateCache",
    "TitansMemory",
    "mesh_axes",
]
