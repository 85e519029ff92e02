"""Language models."""

from mdn_jax.models.blocks import Block, Logprobs, stop_array
from mdn_jax.models.causal_lm import MDNForCausalLM
from mdn_jax.models.config import AttentionConfig, MDNConfig, Mixer
from mdn_jax.models.decoder import Decoder
from mdn_jax.models.generate import Piece, RowLogprobs, generate, stream
from mdn_jax.models.generation_state import GenerationState, initial_state, with_room
from mdn_jax.models.on_mesh import shard_model
from mdn_jax.models.prefill import prefill
from mdn_jax.models.sampling import Sampling, SamplingArrays, sampling_arrays
from mdn_jax.models.state_file import load_state, save_state

__all__ = [
    "AttentionConfig",
    "Block",
    "Decoder",
    "GenerationState",
    "Logprobs",
    "MDNConfig",
    "MDNForCausalLM",
    "Mixer",
    "Piece",
    "RowLogprobs",
    "Sampling",
    "SamplingArrays",
    "generate",
    "initial_state",
    "load_state",
    "prefill",
    "sampling_arrays",
    "save_state",
    "shard_model",
    "stop_array",
    "stream",
    "with_room",
]
