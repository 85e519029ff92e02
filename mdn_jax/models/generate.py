"""Generation: one call on the prompts, then a compiled loop of single tokens."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import NDArray

from mdn_jax.layers.attention import AttentionCache
from mdn_jax.models.arguments import check_prompts, check_stop_tokens, is_whole, row_seeds
from mdn_jax.models.causal_lm import LayerCache, MDNForCausalLM, ModelCache
from mdn_jax.models.fields import require
from mdn_jax.models.sampling import Sampling, draw

Prompts = Sequence[Sequence[int]]


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


class Piece(NamedTuple):
    """Some more tokens of every row.

    Attributes:
      tokens: of each row; a row that has ended gets none.
      ended: rows whose last token was a stop token.
      state: after these tokens.
    """

    tokens: list[list[int]]
    ended: list[bool]
    state: GenerationState


class _Carry(NamedTuple):
    state: GenerationState
    ended: Bool[Array, " B"]
    tokens: Int[Array, "B N"]
    step: Int[Array, ""]


def generate(
    model: MDNForCausalLM,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    state: GenerationState | None = None,
    max_length: int | None = None,
    block: int = 16,
) -> Piece:
    """Continues prompts of any lengths; each row as if it were alone.

    Args:
      model: the model.
      prompts: token ids of each row; a row may be empty if `state` is given.
      max_new_tokens: tokens to generate for each row, at least 1.
      sampling: how tokens are drawn; None: from the model's distribution.
      stop_tokens: tokens that end a row; they are its last.
      seed: of the first row; row `i` has `seed + i`. Or the seeds of all rows. A token depends on
        its row's seed and position, so that a run in pieces equals a run in one.
      state: from an earlier call, which the prompts continue.
      max_length: most tokens that a row may have, prompt included, for models in which softmax
        attention without a window keeps them all; None: as many as needed.
      block: tokens in one call of the compiled loop.

    Returns:
      All tokens generated, and the state after them.

    Raises:
      ValueError: an argument that does not fit, by name, or logits from which no token can be drawn
        (nan, or inf).
    """
    state = prefill(model, prompts, state=state)
    tokens: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for piece in stream(
        model,
        state,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        seed=seed,
        max_length=max_length,
        block=block,
    ):
        for row, new in zip(tokens, piece.tokens, strict=True):
            row += new
        ended, state = piece.ended, piece.state
    return Piece(tokens, ended, state)


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
        _check_state(model, state)
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


def stream(
    model: MDNForCausalLM,
    state: GenerationState,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    max_length: int | None = None,
    block: int = 16,
) -> Iterator[Piece]:
    """Generates from a state of `prefill`, `block` tokens at a time, the first token alone.

    The arguments are those of `generate`. The arguments are checked when the first piece is asked
    for.

    Yields:
      The tokens of every row since the piece before.

    Raises:
      ValueError: an argument that does not fit, by name, or logits from which no token can be drawn
        (nan, or inf).
    """
    _check_state(model, state)
    rows = state.position.shape[0]
    for name, value in (("max_new_tokens", max_new_tokens), ("block", block)):
        require(name, value, "an int >= 1", is_whole(value, 1))
    fits = max_length is None or is_whole(max_length, 1)
    require("max_length", max_length, "an int >= 1 or None", fits)
    fits = sampling is None or isinstance(sampling, Sampling)
    require("sampling", sampling, "a Sampling or None", fits)
    seeds = np.asarray(row_seeds(seed, rows), np.uint32)
    stop = np.zeros((model.config.vocab_size,), bool)
    stop[check_stop_tokens(stop_tokens, model.config.vocab_size)] = True
    state = _with_room(model, state, max_new_tokens, max_length)
    graph, weights = nnx.split(model)
    ended = state.position < 0  # False, and on the state's devices, as after a block
    made, limit = 0, 1
    while made < max_new_tokens and not np.asarray(ended).all():
        carry = _decode(
            graph,
            weights,
            state,
            ended,
            seeds,
            stop,
            limit,
            sampling=sampling or Sampling(),
            size=block,
            # a single row leaves the loop when it ends, and needs no mask
            masked=rows > 1 and bool(stop.any()),
        )
        before, after = np.asarray(state.position), np.asarray(carry.state.position)
        counts = after - before
        new = np.asarray(carry.tokens)
        _check_drawn(new, counts, before)
        state, ended = carry.state, carry.ended
        made += int(carry.step)
        limit = min(block, max_new_tokens - made)
        tokens = [row[:count].tolist() for row, count in zip(new, counts, strict=True)]
        yield Piece(tokens, np.asarray(ended).tolist(), state)


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
    h, cache = model.hidden(tokens, cache=_growing(model, state.cache), lengths=lengths)
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


@partial(jax.jit, static_argnums=0, static_argnames=("sampling", "size", "masked"))
def _decode(
    graph: Any,
    weights: Any,
    state: GenerationState,
    ended: Bool[Array, " B"],
    seeds: Int[Array, " B"],
    stop: Bool[Array, " vocab"],
    limit: Int[Array, ""],
    *,
    sampling: Sampling,
    size: int,
    masked: bool,
) -> _Carry:
    model = nnx.merge(graph, weights)
    rows = jnp.arange(ended.shape[0])

    def goes_on(carry: _Carry) -> Array:
        return (carry.step < limit) & ~jnp.all(carry.ended)

    def step(carry: _Carry) -> _Carry:
        state, active = carry.state, ~carry.ended
        drawn = draw(state.logits, state.seen, seeds, state.position, sampling)
        token = jnp.maximum(drawn, 0)
        logits, cache = model(
            token[:, None],
            cache=state.cache,
            lengths=active.astype(jnp.int32) if masked else None,
        )
        after = GenerationState(
            cache=cache,
            logits=jnp.where(active[:, None], logits[:, 0], state.logits),
            seen=state.seen.at[rows, token].max(active),
            position=state.position + active,
        )
        tokens = carry.tokens.at[:, carry.step].set(drawn)
        ended = carry.ended | (active & (stop[token] | (drawn < 0)))
        return _Carry(after, ended, tokens, carry.step + 1)

    tokens = jnp.zeros((ended.shape[0], size), jnp.int32)
    return lax.while_loop(goes_on, step, _Carry(state, ended, tokens, jnp.zeros((), jnp.int32)))


def _check_state(model: MDNForCausalLM, state: GenerationState) -> None:
    if not isinstance(state, GenerationState):
        raise ValueError(f"state: expected a GenerationState, got {type(state).__name__}")
    layers, vocab = len(model.layers), model.config.vocab_size
    if (len(state.cache), state.logits.shape[-1]) != (layers, vocab):
        raise ValueError(
            f"state: expected one of this model ({layers} layers, {vocab} tokens), got "
            f"{len(state.cache)} layers, {state.logits.shape[-1]} tokens"
        )


def _check_drawn(
    tokens: NDArray[np.int32], counts: NDArray[np.int32], position: NDArray[np.int32]
) -> None:
    """Raises where a row got no token."""
    for row, (new, count) in enumerate(zip(tokens, counts, strict=True)):
        if (new[:count] < 0).any():
            raise ValueError(
                "model: expected logits to draw from, got nan or inf after "
                f"{position[row] + count - 1} tokens of row {row}"
            )


def _windows(model: MDNForCausalLM) -> list[int | None]:
    """The window of every layer; None: none."""
    return [getattr(layer.mixer, "window_size", None) for layer in model.layers]


def _growing(model: MDNForCausalLM, cache: ModelCache) -> ModelCache:
    """The same cache; attention without a window forgets nothing of what comes."""
    return tuple(
        dataclasses.replace(entry, capacity=None)
        if isinstance(entry, AttentionCache) and window is None
        else entry
        for entry, window in zip(cache, _windows(model), strict=True)
    )


def _with_room(
    model: MDNForCausalLM, state: GenerationState, new: int, max_length: int | None
) -> GenerationState:
    """The state with attention caches of a fixed size, in which `new` more tokens have room."""
    before = int(np.max(np.asarray(state.position)))
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


def _bucket(length: int) -> int:
    """The length that a prompt is padded to: a power of two, or above 512 a multiple of 512."""
    return 1 << (length - 1).bit_length() if length <= 512 else -(-length // 512) * 512
