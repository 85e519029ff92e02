"""Generation: prompts are read, then a compiled loop takes single tokens."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from mdn_jax.models.arguments import is_whole, row_limits, row_stop_tokens
from mdn_jax.models.blocks import Block, stop_array
from mdn_jax.models.causal_lm import MDNForCausalLM
from mdn_jax.models.decoder import Decoder, as_decoder
from mdn_jax.models.fields import require
from mdn_jax.models.generation_state import GenerationState, check_state, with_room
from mdn_jax.models.prefill import PIECE, Prompts, prefill
from mdn_jax.models.sampling import Sampling, sampling_arrays


class RowLogprobs(NamedTuple):
    """Log-probabilities of some tokens of a row: nats, of the model's own distribution.

    Attributes:
      drawn: of each token.
      likeliest: for each token the likeliest tokens there with theirs, the likeliest first.
    """

    drawn: list[float]
    likeliest: list[list[tuple[int, float]]]


class Piece(NamedTuple):
    """Some more tokens of every row.

    Attributes:
      tokens: of each row; a row that has ended gets none.
      ended: rows whose last token was a stop token.
      state: after these tokens.
      logprobs: of the tokens of each row; None where not asked for.
    """

    tokens: list[list[int]]
    ended: list[bool]
    state: GenerationState
    logprobs: list[RowLogprobs] | None = None


def generate(
    model: MDNForCausalLM | Decoder,
    prompts: Prompts,
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling | Sequence[Sampling] | None = None,
    stop_tokens: Sequence[int] | Sequence[Sequence[int]] = (),
    seed: int | Sequence[int] = 0,
    state: GenerationState | None = None,
    max_length: int | None = None,
    block: int = 16,
    logprobs: int | None = None,
    attention_mask: Any = None,
    piece: int = PIECE,
) -> Piece:
    """Continues prompts of any lengths; each row as if it were alone.

    Sampling, stop tokens, seeds and numbers of tokens are data: new ones compile nothing.

    Args:
      model: the model, or a decoder of it.
      prompts: token ids of each row; a row may be empty if `state` is given.
      max_new_tokens: tokens to generate for each row, at least 1; or one number a row.
      sampling: how tokens are drawn, or one a row; None: from the model's distribution.
      stop_tokens: tokens that end a row; they are its last. Or a list of them a row.
      seed: of the first row; row `i` has `seed + i`. Or the seeds of all rows. A token depends on
        its row's seed and position, so that a run in pieces equals a run in one.
      state: from an earlier call, which the prompts continue.
      max_length: most tokens that a row may have, prompt included, for models in which softmax
        attention without a window keeps them all; None: as many as needed.
      block: tokens in one call of the compiled loop.
      logprobs: None: none; n: log-probabilities of the tokens and of the n likeliest in each place.
      attention_mask: of padded prompts, see `prefill`.
      piece: most tokens of the prompts in one call of the model, see `prefill`.

    Returns:
      All tokens generated, and the state after them.

    Raises:
      ValueError: an argument that does not fit, by name, or logits from which no token can be drawn
        (nan, or inf).
    """
    model = as_decoder(model)
    state = prefill(model, prompts, attention_mask=attention_mask, state=state, piece=piece)
    tokens: list[list[int]] = [[] for _ in prompts]
    numbers = [RowLogprobs([], []) for _ in prompts]
    ended = [False] * len(prompts)
    for part in stream(
        model,
        state,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        seed=seed,
        max_length=max_length,
        block=block,
        logprobs=logprobs,
    ):
        for row, new in zip(tokens, part.tokens, strict=True):
            row += new
        for number, new_numbers in zip(numbers, part.logprobs or (), strict=False):
            number.drawn.extend(new_numbers.drawn)
            number.likeliest.extend(new_numbers.likeliest)
        ended, state = part.ended, part.state
    return Piece(tokens, ended, state, None if logprobs is None else numbers)


def stream(
    model: MDNForCausalLM | Decoder,
    state: GenerationState,
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling | Sequence[Sampling] | None = None,
    stop_tokens: Sequence[int] | Sequence[Sequence[int]] = (),
    seed: int | Sequence[int] = 0,
    max_length: int | None = None,
    block: int = 16,
    logprobs: int | None = None,
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
    decoder = as_decoder(model)
    check_state(decoder.model, state)
    rows, vocab = state.position.shape[0], decoder.config.vocab_size
    left = row_limits("max_new_tokens", max_new_tokens, rows)
    require("block", block, "an int >= 1", is_whole(block, 1))
    fits = max_length is None or is_whole(max_length, 1)
    require("max_length", max_length, "an int >= 1 or None", fits)
    arrays = sampling_arrays(sampling, rows, vocab_size=vocab, seed=seed, dtype=state.logits.dtype)
    stop = stop_array(row_stop_tokens(stop_tokens, rows, vocab))
    state = with_room(decoder.model, state, left, max_length)
    most = 1
    ended = np.zeros((rows,), bool)
    while left.any():
        made = decoder.block(
            state, np.minimum(left, most), arrays, stop, size=block, logprobs=logprobs
        )
        position = np.asarray(state.position)
        state, most = made.state, block
        tokens, counts, new_ends = jax.device_get((made.tokens, made.counts, made.ended))
        _check_drawn(tokens, counts, position)
        ended = ended | new_ends
        left = np.where(ended, 0, left - counts).astype(np.int32)
        lists = [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]
        yield Piece(lists, ended.tolist(), state, _of_rows(made))


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


def _of_rows(block: Block) -> list[RowLogprobs] | None:
    if block.logprobs is None:
        return None
    counts, (drawn, likeliest, values) = jax.device_get((block.counts, block.logprobs))

    def pairs(row: int, count: int) -> list[list[tuple[int, Any]]]:
        steps = zip(likeliest[row, :count].tolist(), values[row, :count].tolist(), strict=True)
        return [list(zip(*step, strict=True)) for step in steps]

    return [
        RowLogprobs(drawn[row, :count].tolist(), pairs(row, count))
        for row, count in enumerate(counts)
    ]
