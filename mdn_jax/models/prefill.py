"""Reading prompts: the state after them, piece by piece."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int
from numpy.typing import NDArray

from mdn_jax.layers import sharding
from mdn_jax.models.arguments import check_prompts, is_whole, without_padding
from mdn_jax.models.causal_lm import MDNForCausalLM
from mdn_jax.models.decoder import Decoder, as_decoder
from mdn_jax.models.fields import require
from mdn_jax.models.generation_state import (
    GenerationState,
    check_state,
    growing,
    initial_state,
    resized,
)
from mdn_jax.models.structure import Structure

Prompts = Sequence[Sequence[int]] | Int[Array, "B T"] | NDArray[np.integer]

PIECE = 8192
"""Tokens of prompts in one call of the model, over all rows."""

_LEAST = 64  # tokens of a row in a piece, for the states are read and written in each


def prefill(
    model: MDNForCausalLM | Decoder,
    prompts: Prompts,
    *,
    attention_mask: Any = None,
    state: GenerationState | None = None,
    piece: int = PIECE,
) -> GenerationState:
    """The state after the prompts.

    Rows are padded on the right to a common length, of which there are few, so that few shapes are
    compiled; the padding leaves no trace. Long prompts go through the model in pieces of one
    shape, and what is left at the end as a prompt of its length would: memory is that of a piece,
    whatever the length, but for attention without a window, which keeps all keys and values.

    Args:
      model: the model, or a decoder of it.
      prompts: token ids of each row; a row may be empty if `state` is given.
      attention_mask: of prompts that are an array `[B, T]`, the same shape: 1 where a token counts,
        0 where there is padding, on the left or on the right, of any ids. None: all count.
      state: what the prompts continue; None: nothing.
      piece: most tokens in one call of the model, over all rows, but at least 64 of each row (all
        of `piece`, if it is less).

    Raises:
      ValueError: prompts that do not fit, by name.
    """
    decoder = as_decoder(model)
    if state is not None:
        check_state(decoder.model, state)
    require("piece", piece, "an int >= 1", is_whole(piece, 1))
    given = prompts if attention_mask is None else without_padding(prompts, attention_mask)
    had = None if state is None else np.asarray(state.position).tolist()
    rows = check_prompts(given, decoder.config.vocab_size, had)
    lengths = np.asarray([len(new) for new in rows], np.int32)
    longest = int(lengths.max())
    if state is not None and not longest:
        return state
    width = piece_width(piece, len(rows))
    padded = np.zeros((len(rows), longest), np.int32)
    for row, new in zip(padded, rows, strict=True):
        row[: len(new)] = new
    structure, arrays = decoder.structure, decoder.arrays
    with decoder.on_mesh():
        if state is None:
            state = _initial(structure, arrays, len(rows))
        if longest > width:
            state = _with_room(decoder.model, state, longest, width)
        for start in range(0, longest, width):
            part = padded[:, start : start + width]
            part = np.pad(part, ((0, 0), (0, _bucket(part.shape[1]) - part.shape[1])))
            counts = np.clip(lengths - start, 0, width)
            state = _prefill(structure, arrays, state, part, counts)
    return growing(decoder.model, state)


@partial(jax.jit, static_argnums=(0, 2))
def _initial(structure: Structure, arrays: list[Array], rows: int) -> GenerationState:
    state = initial_state(structure.model(arrays), rows)
    cut = PartitionSpec(sharding.cut(sharding.named_axes().rows, rows))
    if cut == PartitionSpec(None):
        return state
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, cut), state)


@partial(jax.jit, static_argnums=0)
def _prefill(
    structure: Structure,
    arrays: list[Array],
    state: GenerationState,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
) -> GenerationState:
    model = structure.model(arrays)
    h, cache = model.hidden(tokens, cache=state.cache, lengths=lengths)
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


def _with_room(
    model: MDNForCausalLM, state: GenerationState, new: int, width: int
) -> GenerationState:
    """Attention without a window sees caches of one shape in all pieces, of few in all prompts."""
    needed = int(np.max(np.asarray(state.position))) + new
    return resized(model, state, width << (-(-needed // width) - 1).bit_length())


def _bucket(length: int) -> int:
    """The length that a prompt is padded to: a power of two, or above 512 a multiple of 512."""
    return 1 << (length - 1).bit_length() if length <= 512 else -(-length // 512) * 512


def piece_width(piece: int, rows: int) -> int:
    """Tokens of each row in a piece: a length of `_bucket` not above its share."""
    length = max(piece // rows, min(piece, _LEAST))
    return 1 << (length.bit_length() - 1) if length <= 512 else length // 512 * 512
