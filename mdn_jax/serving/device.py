"""What a server has on the device: the model, and rows of one generation state of constant size.

Every program here has fixed shapes, so that what `warm` compiles is all that runs.
"""

from collections.abc import Callable, Sequence
from typing import Concatenate, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from mdn_jax.layers.attention import AttentionCache, SoftmaxAttention
from mdn_jax.models import (
    Block,
    Decoder,
    GenerationState,
    MDNForCausalLM,
    Sampling,
    SamplingArrays,
    sampling_arrays,
)
from mdn_jax.models.steps import StepKind
from mdn_jax.models.structure import Structure
from mdn_jax.serving.jobs import MOST_STOP_TOKENS
from mdn_jax.serving.programs import (
    Rows,
    TokenScores,
    at_most,
    begin_rows,
    initial_rows,
    left_after,
    place_row,
    read_rows,
    stop_row,
    take_row,
)


class Part(NamedTuple):
    """Some more tokens of a prompt.

    Attributes:
      slot: whose text they are of.
      tokens: ids.
      fresh: whether the text begins with them; else they go on from the slot's state.
    """

    slot: int
    tokens: Sequence[int]
    fresh: bool


class Start(NamedTuple):
    """A text whose prompt is in its slot, and how it goes on.

    Attributes:
      slot: of the text.
      left: most tokens to make.
      sampling: how they are drawn.
      seed: of the draws.
      stop_tokens: that end it.
    """

    slot: int
    left: int
    sampling: Sampling
    seed: int
    stop_tokens: Sequence[int]


class Device:
    """The model and its rows; belongs to one thread.

    Args:
      model: the model.
      slots: rows that are decoded at once.
      piece: most tokens of prompts in one call.
      together: prompts in one call at most; None: on a CPU 1, for padding costs time there, else as
        many as a piece has room for.
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
        together: int | None = None,
        block: int,
        max_length: int,
        end_tokens: int,
        top: int,
        steps: StepKind | None = None,
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
        most = min(slots, together or (1 if jax.default_backend() == "cpu" else piece))
        self._together = {size: min(most, piece // size) for size in self._sizes}
        self._decoder = Decoder(model, steps=steps)
        self.empty = self._call(initial_rows, 1, max_length)
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.empty.cache))
        self._rows = self._no_rows()

    def warm(self) -> None:
        """Compiles everything, and leaves no row active."""
        # what a program gives can lie over a mesh in another way than what it first got
        for _ in range(1 if self._decoder.mesh is None else 2):
            for size in self._sizes:
                self.read([Part(0, [0] * size, fresh=True)], size)
            self.score(Part(0, [0] * self.piece, fresh=True), [0] * self.piece)
            self.place(0, self.take(0))
            for sampling in (Sampling(logit_bias={0: 1.0}), Sampling()):
                self.begin([Start(0, 1, sampling, 0, ())])
                self.decode(1, logprobs=True)
            self.begin([Start(0, 1, Sampling(), 0, ())])
            jax.block_until_ready(self.decode(1, logprobs=False).tokens)
            self.stop(0)

    def padded(self, count: int) -> int:
        """The size of the program that reads so many tokens, `piece` at most."""
        return next(size for size in self._sizes if size >= count)

    def rows_of(self, size: int) -> int:
        """How many prompts the program of this size reads at once."""
        return self._together[size]

    def read(self, parts: Sequence[Part], size: int) -> Array:
        """Reads the next tokens of some texts, no more than `rows_of(size)`, into their slots.

        Returns:
          Their positions after that, which can be waited for.
        """
        position, _ = self._read(parts, size, None)
        return position

    def score(self, part: Part, following: Sequence[int]) -> tuple[Array, TokenScores]:
        """As `read`, with the log-probabilities of the token that follows each."""
        targets = np.zeros((1, self.piece), np.int32)
        targets[0, : len(following)] = following
        position, scores = self._read([part], self.piece, targets)
        assert scores is not None
        return position, scores

    def _read(
        self, parts: Sequence[Part], size: int, targets: NDArray[np.int32] | None
    ) -> tuple[Array, TokenScores | None]:
        rows = self._together[size] if targets is None else 1
        slots = np.arange(self.slots, self.slots + rows, dtype=np.int32)  # of no text
        tokens = np.zeros((rows, size), np.int32)
        lengths, fresh = np.zeros((rows,), np.int32), np.ones((rows,), bool)
        for row, part in enumerate(parts):
            slots[row], lengths[row], fresh[row] = part.slot, len(part.tokens), part.fresh
            tokens[row, : len(part.tokens)] = part.tokens
        state, position, scores = self._call(
            read_rows,
            self._rows.state,
            self.empty,
            slots,
            fresh,
            tokens,
            lengths,
            targets,
            top=0 if targets is None else self.top,
        )
        self._rows = self._rows._replace(state=state)
        return position, scores

    def take(self, slot: int) -> GenerationState:
        """A copy of the state of one row."""
        return self._on_rows(take_row, self._rows.state, np.int32(slot))

    def place(self, slot: int, state: GenerationState) -> None:
        """Puts the state of one row into a slot."""
        after = self._on_rows(place_row, self._rows.state, state, np.int32(slot))
        self._rows = self._rows._replace(state=after)

    def fit(self, state: GenerationState) -> GenerationState:
        """A state of one row with the room that rows have here."""
        cache = []
        for entry, like in zip(state.cache, self.empty.cache, strict=True):
            if isinstance(entry, AttentionCache) and isinstance(like, AttentionCache):
                entry = entry.resized(like.k.shape[1])
            cache.append(entry)
        return state._replace(cache=tuple(cache))

    def begin(self, starts: Sequence[Start]) -> None:
        """Texts whose prompts are in their slots get their tokens from now on."""
        rows = max(self._together.values())
        for first in range(0, len(starts), rows):
            some = starts[first : first + rows]
            more = rows - len(some)
            slots = [start.slot for start in some] + [self.slots + i for i in range(more)]
            stop = np.full((rows, self._stops), -1, np.int32)
            for row, start in zip(stop, some, strict=False):
                row[: len(start.stop_tokens)] = start.stop_tokens
            sampling = self._sampling(
                [start.sampling for start in some] + [Sampling()] * more,
                [start.seed for start in some] + [0] * more,
                bias=any(start.sampling.logit_bias for start in some),
            )
            left = np.asarray([start.left for start in some] + [0] * more, np.int32)
            old = self._rows.left, self._rows.sampling, self._rows.stop
            new = self._on_rows(
                begin_rows, old, (left, sampling, stop), np.asarray(slots, np.int32)
            )
            self._rows = Rows(self._rows.state, *new)

    def stop(self, slot: int) -> None:
        """Takes a row out: it gets no more tokens."""
        self._rows = self._rows._replace(left=stop_row(self._rows.left, np.int32(slot)))

    def decode(self, count: int, *, logprobs: bool) -> Block:
        """Up to `count` more tokens of every active row; the call does not wait for them."""
        rows = self._rows
        block = self._decoder.block(
            rows.state,
            at_most(rows.left, np.int32(count)),
            rows.sampling,
            rows.stop,
            size=self.block,
            logprobs=self.top if logprobs else None,
            donate=True,
        )
        left = left_after(rows.left, block.counts, block.ended)
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

    def _on_rows[**P, R](
        self, program: Callable[Concatenate[Structure, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """As `_call`, of a program that does not need the parameters."""
        with self._decoder.on_mesh():
            return program(self._decoder.structure, *args, **kwargs)

    def _no_rows(self) -> Rows:
        sampling = self._sampling([Sampling()] * self.slots, [0] * self.slots, bias=True)
        stop = jnp.full((self.slots, self._stops), -1, jnp.int32)
        state = self._call(initial_rows, self.slots, self._max_length)
        return Rows(state, jnp.zeros((self.slots,), jnp.int32), sampling, stop)

    def _sampling(
        self, sampling: list[Sampling], seeds: list[int], *, bias: bool
    ) -> SamplingArrays:
        return sampling_arrays(
            sampling,
            len(seeds),
            vocab_size=self.model.config.vocab_size,
            seed=seeds,
            dtype=self.empty.logits.dtype,
            bias=bias,
        )
