"""Language models."""

from mdn_jax.models.causal_lm import MDNForCausalLM
from mdn_jax.models.config import AttentionConfig, MDNConfig

__all__ = ["AttentionConfig", "MDNConfig", "MDNForCausalLM"]
