"""What generation keeps of each row: the state before the next token."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import NDArray

from mdn_jax.layers.attention import AttentionCache
from mdn_jax.models.causal_lm import LayerCache, MDNForCausalLM, ModelCache


class GenerationState(NamedTuple):
    """What generation keeps of each row's tokens; a pytree.

    Attributes:
      cache: of the model; every token so far has gone through it.
      logits: of the next token, float32 (float64 for float64).
      seen: tokens that the row has had.
      position: number of tokens that the row has had.
    """

    cache: ModelCache
    logits: Float[Array, "B vocab"]
    seen: Bool[Array, "B vocab"]
    position: Int[Array, " B"]


def initial_state(model: MDNForCausalLM, batch_size: int) -> GenerationState:
    """The state before the first token of every row; its logits are zeros."""
    wide = jnp.promote_types(model.dtype, jnp.float32)
    shape = (batch_size, model.config.vocab_size)
    return GenerationState(
        cache=model.init_cache(batch_size),
        logits=jnp.zeros(shape, wide),
        seen=jnp.zeros(shape, bool),
        position=jnp.zeros((batch_size,), jnp.int32),
    )


def check_state(model: MDNForCausalLM, state: GenerationState) -> None:
    """Raises ValueError unless it is a state of this model."""
    if not isinstance(state, GenerationState):
        raise ValueError(f"state: expected a GenerationState, got {type(state).__name__}")
    layers, vocab = len(model.layers), model.config.vocab_size
    if (len(state.cache), state.logits.shape[-1]) != (layers, vocab):
        raise ValueError(
            f"state: expected one of this model ({layers} layers, {vocab} tokens), got "
            f"{len(state.cache)} layers, {state.logits.shape[-1]} tokens"
        )


def _windows(model: MDNForCausalLM) -> list[int | None]:
    """The window of every layer; None: none."""
    return [getattr(layer.mixer, "window_size", None) for layer in model.layers]


def growing(model: MDNForCausalLM, state: GenerationState) -> GenerationState:
    """The same state; attention without a window forgets nothing of what comes."""
    return _of_unlimited(model, state, lambda entry: dataclasses.replace(entry, capacity=None))


def resized(model: MDNForCausalLM, state: GenerationState, room: int) -> GenerationState:
    """The state with attention caches without a window of `room` entries."""
    return _of_unlimited(model, state, lambda entry: entry.resized(room))


def _of_unlimited(
    model: MDNForCausalLM,
    state: GenerationState,
    change: Callable[[AttentionCache], AttentionCache],
) -> GenerationState:
    cache: list[LayerCache] = [
        change(entry) if isinstance(entry, AttentionCache) and window is None else entry
        for entry, window in zip(state.cache, _windows(model), strict=True)
    ]
    return state._replace(cache=tuple(cache))


def with_room(
    model: MDNForCausalLM,
    state: GenerationState,
    new: int | NDArray[np.int32],
    max_length: int | None,
) -> GenerationState:
    """The state with attention caches of a fixed size, in which `new` more tokens have room."""
    position = np.asarray(state.position)
    row = int(np.argmax(position + new))  # the longest at the end
    before, new = int(position[row]), int(np.broadcast_to(new, position.shape)[row])
    room = -(-(before + new) // 64) * 64  # few shapes
    cache: list[LayerCache] = []
    for i, (entry, window) in enumerate(zip(state.cache, _windows(model), strict=True)):
        if isinstance(entry, AttentionCache):
            if window is None and max_length is not None and before + new > max_length:
                raise ValueError(
                    f"max_length: expected at least {before + new} ({before} tokens so far and "
                    f"max_new_tokens = {new}: layer {i} attends to all of them), got {max_length}"
                )
            entry = entry.resized(room if window is None else window - 1)
        cache.append(entry)
    return state._replace(cache=tuple(cache))
