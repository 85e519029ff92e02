"""What a server has on the device: the model, and rows of one generation state of constant size.

Every program here has fixed shapes, so that what `warm` compiles is all that runs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Concatenate, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import NDArray

from mdn_jax.layers import sharding
from mdn_jax.layers.attention import AttentionCache, SoftmaxAttention
from mdn_jax.models import (
    Block,
    Decoder,
    GenerationState,
    MDNForCausalLM,
    Sampling,
    SamplingArrays,
    initial_state,
    sampling_arrays,
)
from mdn_jax.models.steps import StepKind
from mdn_jax.models.structure import Structure
from mdn_jax.serving.jobs import MOST_STOP_TOKENS


class Rows(NamedTuple):
    """What decoding has of every row; a pytree.

    Attributes:
      state: after the tokens so far.
      left: tokens that each row may still get; 0: it is not active.
      sampling: how they are drawn.
      stop: tokens that end it; -1: none.
    """

    state: GenerationState
    left: Int[Array, " B"] | NDArray[np.int32]
    sampling: SamplingArrays
    stop: Int[Array, "B S"] | NDArray[np.int32]


class TokenScores(NamedTuple):
    """Log-probabilities (nats) at every step of a piece; a pytree.

    Attributes:
      target: of the next token.
      likeliest: the likeliest next tokens, the likeliest first.
      of_likeliest: theirs.
    """

    target: Float[Array, " T"]
    likeliest: Int[Array, "T n"]
    of_likeliest: Float[Array, "T n"]


class Device:
    """The model and its rows; belongs to one thread.

    Args:
      model: the model.
      slots: rows that are decoded at once.
      piece: most tokens of a prompt in one call.
      block: most tokens of a row in one call of the compiled loop.
      max_length: room for a row's tokens in softmax attention without a window, of models that
        have it.
      end_tokens: of the tokenizer, beside those of a request.
      top: likeliest tokens that are told where log-probabilities are asked for.
      steps: what takes single tokens, see `Decoder`.

    Raises:
      ValueError: steps by kernels for a model that these do not support.

    Attributes:
      state_bytes: what one row's caches take.
      limited: whether `max_length` is a limit of this model.
    """

    def __init__(
        self,
        model: MDNForCausalLM,
        *,
        slots: int,
        piece: int,
        block: int,
        max_length: int,
        end_tokens: int,
        top: int,
        steps: StepKind = "layers",
    ) -> None:
        self.model, self.slots, self.piece, self.block = model, slots, piece, block
        self.top = min(top, model.config.vocab_size)
        mixers = [layer.mixer for layer in model.layers]
        self.limited = any(
            isinstance(mixer, SoftmaxAttention) and mixer.window_size is None for mixer in mixers
        )
        self._max_length = max_length
        self._stops = MOST_STOP_TOKENS + end_tokens
        self._sizes = sorted({max(1, piece // 16), max(1, piece // 4), piece})
        self._decoder = Decoder(model, steps=steps)
        self.empty = self._call(_initial, 1, max_length)
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.empty.cache))
        self._rows = self._no_rows()

    def warm(self) -> None:
        """Compiles everything, and leaves no row active."""
        for count in self._sizes:
            state = self.read(self.empty, [0] * count)
        self.score(self.empty, [0] * self.piece, [0] * self.piece)
        self.put(0, state, left=1, sampling=Sampling(), seed=0, stop_tokens=())
        for logprobs in (False, True):
            jax.block_until_ready(self.decode(1, logprobs=logprobs).tokens)
        self.stop(0)

    def read(self, state: GenerationState, tokens: Sequence[int]) -> GenerationState:
        """The state of one row after at most `piece` more tokens."""
        padded, lengths = self._padded(tokens)
        after, _ = self._call(_read, state, padded, lengths, None, top=0)
        return after

    def score(
        self, state: GenerationState, tokens: Sequence[int], following: Sequence[int]
    ) -> tuple[GenerationState, TokenScores]:
        """As `read`, with the log-probabilities of the token that follows each."""
        padded, lengths = self._padded(tokens, self.piece)
        targets, _ = self._padded(following, self.piece)
        after, scores = self._call(_read, state, padded, lengths, targets, top=self.top)
        assert scores is not None
        return after, scores

    def fit(self, state: GenerationState) -> GenerationState:
        """A state of one row with the room that rows have here."""
        cache = []
        for entry, like in zip(state.cache, self.empty.cache, strict=True):
            if isinstance(entry, AttentionCache) and isinstance(like, AttentionCache):
                entry = entry.resized(like.k.shape[1])
            cache.append(entry)
        return state._replace(cache=tuple(cache))

    def put(
        self,
        slot: int,
        state: GenerationState,
        *,
        left: int,
        sampling: Sampling,
        seed: int,
        stop_tokens: Sequence[int],
    ) -> None:
        """Puts a row of one text into a slot."""
        stop = np.full((1, self._stops), -1, np.int32)
        stop[0, : len(stop_tokens)] = stop_tokens
        row = Rows(state, np.full((1,), left, np.int32), self._sampling(sampling, [seed]), stop)
        self._rows = self._call(_put, self._rows, row, np.int32(slot))

    def stop(self, slot: int) -> None:
        """Takes a row out: it gets no more tokens."""
        self._rows = self._rows._replace(left=_without(self._rows.left, np.int32(slot)))

    def decode(self, count: int, *, logprobs: bool) -> Block:
        """Up to `count` more tokens of every active row; the call does not wait for them."""
        rows = self._rows
        block = self._decoder.block(
            rows.state,
            _at_most(rows.left, np.int32(count)),
            rows.sampling,
            rows.stop,
            size=self.block,
            logprobs=self.top if logprobs else None,
            donate=True,
        )
        left = _after(rows.left, block.counts, block.ended)
        self._rows = rows._replace(state=block.state, left=left)
        return block

    def _call[**P, R](
        self,
        program: Callable[Concatenate[Structure, list[Array], P], R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Calls a program with the model, under the mesh over which its parameters lie."""
        decoder = self._decoder
        with decoder.on_mesh():
            return program(decoder.structure, decoder.arrays, *args, **kwargs)

    def _no_rows(self) -> Rows:
        sampling = self._sampling(Sampling(), [0] * self.slots)
        stop = jnp.full((self.slots, self._stops), -1, jnp.int32)
        state = self._call(_initial, self.slots, self._max_length)
        return Rows(state, jnp.zeros((self.slots,), jnp.int32), sampling, stop)

    def _sampling(self, sampling: Sampling, seeds: list[int]) -> SamplingArrays:
        return sampling_arrays(
            sampling,
            len(seeds),
            vocab_size=self.model.config.vocab_size,
            seed=seeds,
            dtype=self.empty.logits.dtype,
            bias=True,
        )

    def _padded(
        self, tokens: Sequence[int], size: int | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The tokens in one of few lengths, and how many they are."""
        size = size or next(size for size in self._sizes if size >= len(tokens))
        padded = np.zeros((1, size), np.int32)
        padded[0, : len(tokens)] = tokens
        return padded, np.full((1,), len(tokens), np.int32)


@partial(jax.jit, static_argnums=(0, 2, 3))
def _initial(
    structure: Structure, arrays: list[Array], rows: int, max_length: int
) -> GenerationState:
    model = structure.model(arrays)
    state = initial_state(model, rows)._replace(cache=model.init_cache(rows, max_length))
    return _over_rows(state, rows)


def _over_rows[T](rows: T, count: int) -> T:
    """The same, cut over the axes of the ambient mesh for the rows of a batch."""
    cut = PartitionSpec(sharding.cut(sharding.named_axes().rows, count))
    if cut == PartitionSpec(None):
        return rows
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, cut), rows)


@partial(jax.jit, static_argnums=0, static_argnames="top")
def _read(
    structure: Structure,
    arrays: list[Array],
    state: GenerationState,
    tokens: Int[Array, "1 T"],
    lengths: Int[Array, "1"],
    targets: Int[Array, "1 T"] | None,
    *,
    top: int,
) -> tuple[GenerationState, TokenScores | None]:
    model = structure.model(arrays)
    h, cache = model.hidden(tokens, cache=state.cache, lengths=lengths)
    own = jnp.arange(tokens.shape[1]) < lengths[:, None]
    scores = None
    if targets is None:
        logits = model.logits(lax.dynamic_index_in_dim(h, lengths[0] - 1, 1, keepdims=False))
    else:
        all_logits = model.logits(h[0])
        logits = lax.dynamic_index_in_dim(all_logits, lengths[0] - 1, 0)
        wide = jax.nn.log_softmax(all_logits, axis=-1)
        values, ids = lax.top_k(wide, top)
        target = jnp.take_along_axis(wide, targets[0][:, None], axis=-1)[:, 0]
        scores = TokenScores(target, ids.astype(jnp.int32), values)
    after = GenerationState(
        cache=cache,
        logits=logits,
        seen=state.seen.at[jnp.zeros_like(tokens), tokens].max(own),
        position=state.position + lengths,
    )
    return after, scores


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _put(
    structure: Structure, arrays: list[Array], rows: Rows, row: Rows, slot: Int[Array, ""]
) -> Rows:
    def put(all_rows: Array, one: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(all_rows, one.astype(all_rows.dtype), slot, 0)

    return _over_rows(jax.tree.map(put, rows, row), rows.stop.shape[0])


@jax.jit
def _without(left: Int[Array, " B"], slot: Int[Array, ""]) -> Int[Array, " B"]:
    return left.at[slot].set(0)


@jax.jit
def _at_most(left: Int[Array, " B"], count: Int[Array, ""]) -> Int[Array, " B"]:
    return jnp.minimum(left, count)


@jax.jit
def _after(
    left: Int[Array, " B"], counts: Int[Array, " B"], ended: Bool[Array, " B"]
) -> Int[Array, " B"]:
    return jnp.where(ended, 0, left - counts)
