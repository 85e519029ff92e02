"""Reading prompts: the state after them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from mdn_jax.models.arguments import check_prompts
from mdn_jax.models.causal_lm import MDNForCausalLM
from mdn_jax.models.generation_state import (
    GenerationState,
    check_state,
    growing,
    initial_state,
)

Prompts = Sequence[Sequence[int]]


def prefill(
    model: MDNForCausalLM, prompts: Prompts, *, state: GenerationState | None = None
) -> GenerationState:
    """The state after the prompts, by one call of the model.

    Rows are padded on the right to a common length, of which there are few, so that few shapes are
    compiled; the padding leaves no trace.

    Args:
      model: the model.
      prompts: token ids of each row; a row may be empty if `state` is given.
      state: what the prompts continue; None: nothing.

    Raises:
      ValueError: prompts that do not fit, by name.
    """
    if state is not None:
        check_state(model, state)
    had = None if state is None else np.asarray(state.position).tolist()
    tokens = check_prompts(prompts, model.config.vocab_size, had)
    longest = max(map(len, tokens))
    if state is not None and not longest:
        return state
    padded = np.zeros((len(tokens), _bucket(longest)), np.int32)
    for row, new in zip(padded, tokens, strict=True):
        row[: len(new)] = new
    graph, weights = nnx.split(model)
    lengths = np.asarray([len(new) for new in tokens], np.int32)
    return _prefill(graph, weights, state, padded, lengths)


@partial(jax.jit, static_argnums=0)
def _prefill(
    graph: Any,
    weights: Any,
    state: GenerationState | None,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
) -> GenerationState:
    model = nnx.merge(graph, weights)
    if state is None:
        state = initial_state(model, tokens.shape[0])
    h, cache = model.hidden(tokens, cache=growing(model, state.cache), lengths=lengths)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    logits = model.logits(jnp.take_along_axis(h, last, axis=1)[:, 0])
    rows = jnp.arange(tokens.shape[0])[:, None]
    own = jnp.arange(tokens.shape[1]) < lengths[:, None]
    return GenerationState(
        cache=cache,
        logits=jnp.where(lengths[:, None] > 0, logits, state.logits),
        seen=state.seen.at[rows, tokens].max(own),
        position=state.position + lengths,
    )


def _bucket(length: int) -> int:
    """The length that a prompt is padded to: a power of two, or above 512 a multiple of 512."""
    return 1 << (length - 1).bit_length() if length <= 512 else -(-length // 512) * 512
