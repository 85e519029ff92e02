"""A model small enough to compile in seconds."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM

TINY_MODEL = {
    "vocab_size": 257,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_heads": 1,
    "head_dim": 8,
    "expand_v": 1.0,
    "intermediate_size": 16,
}


def chain_model(following: Sequence[int]) -> MDNForCausalLM:
    """A model that knows one thing: after token `i` comes `following[i]`."""
    size = len(following)
    config = MDNConfig(**TINY_MODEL | {"vocab_size": size})
    model = MDNForCausalLM(config, implementation="scan", rngs=nnx.Rngs(0))
    model.layers[0].mixer.o_proj.kernel[...] *= 0
    model.layers[0].mlp.down_proj.kernel[...] *= 0
    model.embeddings[...] = jnp.eye(size, config.hidden_size)
    head = jnp.zeros((config.hidden_size, size))
    model.lm_head[...] = head.at[jnp.arange(size), jnp.asarray(following)].set(5.0)
    return model


def break_model(model: MDNForCausalLM) -> MDNForCausalLM:
    """A copy with logits of nan."""
    broken = nnx.clone(model)
    broken.norm.scale[...] = broken.norm.scale[...] * jnp.nan
    return broken
