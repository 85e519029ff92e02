"""How a generation keeps its recurrent states, and going back some tokens."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int
from numpy.typing import NDArray

from mdn_jax.layers.attention import AttentionCache
from mdn_jax.layers.momentum_deltanet import MomentumDeltaNet
from mdn_jax.layers.replay_cache import ReplayCache, rewound
from mdn_jax.models.causal_lm import LayerCache, MDNForCausalLM, ModelCache
from mdn_jax.models.fields import require
from mdn_jax.models.generation_state import GenerationState, Recent, check_state
from mdn_jax.ops.replay import check_replay
from mdn_jax.ops.state import StateDtype, check_state_dtype


def with_states(
    model: MDNForCausalLM,
    state: GenerationState,
    *,
    state_dtype: StateDtype | None = None,
    replay: int | None = None,
) -> GenerationState:
    """The same state with the states of momentum delta rules kept in another way.

    Other mixers, and attention, keep theirs as they do. What is computed is computed in float32.
    Nothing before this point can be taken back.

    Args:
      model: the model that made the state.
      state: what generation keeps; any way of keeping.
      state_dtype: "float32", "bfloat16" or "float16_scaled" (float16 with a scale a column); None:
        as they are.
      replay: L, 4, 8 or 16: states are written every L tokens, the tokens since are kept, and
        `rewind` goes back up to L tokens that were generated. 0: they are written with every token.
        None: as it is.

    Raises:
      ValueError: a state of another model, or options that do not fit, by name.
    """
    check_state(model, state)
    if state_dtype is not None:
        check_state_dtype(state_dtype)
    if replay not in (None, 0):
        check_replay(replay)
    if state_dtype is None and replay is None:
        return state
    recent, length = state.recent, replay
    if length is None:
        length = 0 if recent is None else recent.tokens.shape[1] - 1

    def own(mixer: Any, entry: LayerCache) -> LayerCache:
        if isinstance(mixer, MomentumDeltaNet):
            kept: LayerCache = mixer.kept_cache(entry, state_dtype, replay)
            return kept
        if isinstance(entry, AttentionCache) and mixer.window_size is not None:
            return entry.resized(mixer.window_size - 1 + length)
        return entry

    layers = zip(model.layers, state.cache, strict=True)
    cache = tuple(own(layer.mixer, entry) for layer, entry in layers)
    if length == 0:
        recent = None
    else:
        rows, vocab = state.logits.shape
        recent = Recent(
            tokens=jnp.zeros((rows, length + 1), jnp.int32),
            logits=jnp.zeros((rows, length + 1, vocab), state.logits.dtype),
            depth=jnp.zeros((rows,), jnp.int32),
        )
    after = state._replace(cache=cache, recent=recent)
    return from_here(after)


def rewind(state: GenerationState, tokens: int | Sequence[int]) -> GenerationState:
    """The state of some tokens ago, logits, tokens seen and all; nothing is computed anew.

    What can be taken back are the last L tokens that were generated since the last prompt, under
    `replay=L`. The state given stays valid.

    Args:
      state: of `generate` or `stream` with `replay`.
      tokens: how many to take back, from all rows or from each.

    Raises:
      ValueError: a state without `replay`, one of a model with other mixers than momentum delta
        rules and attention, or more tokens than can be taken back.
    """
    if state.recent is None:
        raise ValueError("state: expected one of generate(..., replay=L), got one without replay")
    depth = np.asarray(state.recent.depth)
    back: NDArray[Any] = np.asarray(tokens)
    whole = np.issubdtype(back.dtype, np.integer) and back.shape in ((), depth.shape)
    fits = whole and bool(((back >= 0) & (back <= depth)).all())
    most = ", ".join(map(str, depth))
    require("tokens", tokens, f"ints from 0 to {most} (of all rows, or of each)", fits)
    return _rewind(state, jnp.asarray(np.broadcast_to(back, depth.shape), jnp.int32))


def rewind_cache(cache: ModelCache, steps: Int[Array, " B"]) -> ModelCache:
    """A model's cache of `steps` tokens ago, of each row: for those who have the logits.

    Args:
      cache: of momentum delta rules with `replay`, and of attention that has not forgotten what its
        windows need.
      steps: at most L, and at most what `cache[i].state.kept` says; traced numbers are not checked.

    Raises:
      ValueError: a cache of other layers, or more steps than are kept.
    """

    def own(i: int, entry: LayerCache) -> LayerCache:
        if isinstance(entry, AttentionCache):
            return entry.rewound(steps)
        if isinstance(entry, ReplayCache):
            return rewound(entry, steps)
        raise ValueError(
            "state: expected layers of momentum delta rules with replay and of attention, "
            f"got {type(entry).__name__} in layer {i}"
        )

    return tuple(own(i, entry) for i, entry in enumerate(cache))


@jax.jit
def _rewind(state: GenerationState, back: Int[Array, " B"]) -> GenerationState:
    recent = state.recent
    assert recent is not None
    slots = recent.tokens.shape[1]
    rows = jnp.arange(back.shape[0])
    position = state.position - back
    ages = jnp.arange(slots - 1)
    taken = jnp.take_along_axis(recent.tokens, (state.position[:, None] - ages) % slots, axis=1)
    gone = (ages < back[:, None]) & (taken < 0)  # those that the row had not had before
    ids = jnp.where(gone, -1 - taken, state.seen.shape[1])
    return GenerationState(
        cache=rewind_cache(state.cache, back),
        logits=recent.logits[rows, position % slots],
        seen=state.seen.at[rows[:, None], ids].set(False, mode="drop"),
        position=position,
        recent=recent._replace(depth=recent.depth - back),
    )


def remembered(
    before: GenerationState, after: GenerationState, token: Int[Array, " B"], own: Bool[Array, " B"]
) -> GenerationState:
    """The state after one more token of the rows that are `own`, with its point kept."""
    recent = after.recent
    if recent is None:
        return after
    rows, slots = jnp.arange(own.shape[0]), recent.tokens.shape[1]
    slot = after.position % slots
    encoded = jnp.where(before.seen[rows, token], token, -1 - token)
    kept = Recent(
        tokens=recent.tokens.at[rows, slot].set(jnp.where(own, encoded, recent.tokens[rows, slot])),
        logits=recent.logits.at[rows, slot].set(after.logits),
        depth=jnp.minimum(recent.depth + own, slots - 1),
    )
    return after._replace(recent=kept)


def from_here(state: GenerationState) -> GenerationState:
    """The state with nothing before it to go back to."""
    recent = state.recent
    if recent is None:
        return state
    slot = state.position % recent.tokens.shape[1]
    kept = recent._replace(
        logits=recent.logits.at[jnp.arange(slot.shape[0]), slot].set(state.logits),
        depth=jnp.zeros_like(recent.depth),
    )
    return state._replace(recent=kept)
