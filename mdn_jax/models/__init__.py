"""Language models."""

from mdn_jax.models.causal_lm import MDNForCausalLM
from mdn_jax.models.config import AttentionConfig, MDNConfig, Mixer
from mdn_jax.models.generate import GenerationState, generate, initial_state, prefill, stream
from mdn_jax.models.long_prompt import prefill_over
from mdn_jax.models.sampling import Sampling
from mdn_jax.models.state_file import load_state, save_state

__all__ = [
    "AttentionConfig",
    "GenerationState",
    "MDNConfig",
    "MDNForCausalLM",
    "Mixer",
    "Sampling",
    "generate",
    "initial_state",
    "load_state",
    "prefill",
    "prefill_over",
    "save_state",
    "stream",
]
