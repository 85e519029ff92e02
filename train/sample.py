"""A short sample at the end of a run."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from mdn_jax import MDNForCausalLM
from train.optimizer import Params
from train.tokenizer import DOCUMENT_START, VOCAB_SIZE, decode, encode


def sample(
    model: MDNForCausalLM,
    params: Params,
    *,
    prompt: str,
    length: int,
    temperature: float,
    seed: int,
) -> str:
    """Generates text: one pass over the prompt, then one token at a time.

    Args:
      model: the model; its own parameters are not used.
      params: parameters to use.
      prompt: text to continue, UTF-8; empty means the start of a document.
      length: tokens to generate.
      temperature: of the sampling; 0 takes the likeliest token.
      seed: of the sampling.

    Returns:
      The prompt and its continuation.
    """
    graph, _, *rest = nnx.split(model, nnx.Param, ...)
    tokens = encode(prompt.encode()).astype("int32")[None]

    def pick(logits: Float[Array, "1 vocab"], key: Array) -> Int[Array, "1"]:
        bytes_only = logits[:, :VOCAB_SIZE].at[:, DOCUMENT_START].set(-jnp.inf)
        if temperature == 0:
            return jnp.argmax(bytes_only, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, bytes_only / temperature).astype(jnp.int32)

    @partial(jax.jit, static_argnums=2)
    def generate(params: Params, tokens: Int[Array, "1 T"], length: int) -> Int[Array, " N"]:
        run = nnx.merge(graph, params, *rest)
        logits, cache = run(tokens, cache=run.init_cache(1, max_length=tokens.shape[1] + length))

        def step(carry: tuple[Array, Any], key: Array) -> tuple[tuple[Array, Any], Array]:
            logits, cache = carry
            token = pick(logits, key)
            following, cache = run(token[:, None], cache=cache)
            return (following[:, -1], cache), token[0]

        return lax.scan(
            step, (logits[:, -1], cache), jax.random.split(jax.random.key(seed), length)
        )[1]

    return prompt + decode(generate(params, tokens, length)) if length else prompt
