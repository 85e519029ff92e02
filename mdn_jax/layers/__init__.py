"""Flax NNX layers."""

from mdn_jax.layers.attention import AttentionCache, SoftmaxAttention
from mdn_jax.layers.momentum_deltanet import MDNCache, MomentumDeltaNet

__all__ = ["AttentionCache", "MDNCache", "MomentumDeltaNet", "SoftmaxAttention"]
