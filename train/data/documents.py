"""Tokenised documents, in memory or mapped from files."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mdn_jax.text.tokenizer import Tokenizer

_TOGETHER = 1024  # documents tokenised in one call, in as many threads as the library has


class Example(NamedTuple):
    """A document as tokens.

    Attributes:
      tokens: at least one.
      size: bytes of text that the learned tokens stand for, without the first token.
      learned: which of the tokens the loss is on, as targets; None: all.
    """

    tokens: NDArray[np.uint32]
    size: int
    learned: NDArray[np.bool_] | None = None


Encoder = Callable[[Sequence[bytes]], Iterator[Example]]
"""From documents to tokens; those that have none are left out."""


@dataclass(frozen=True)
class Documents:
    """Documents as stretches of arrays of tokens.

    Attributes:
      arrays: tokens, unsigned integers; several documents in each.
      array: index of each document's array, `[D]` int32.
      start: of each document in its array, `[D]` int64.
      length: of each document, `[D]` int64, at least 1.
      size: bytes of text that each document's targets stand for, `[D]` int64.
      learned: for each array which of its tokens are; None: all but a document's first.
    """

    arrays: Sequence[NDArray[np.unsignedinteger]]
    array: NDArray[np.int32]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    size: NDArray[np.int64]
    learned: Sequence[NDArray[np.bool_]] | None = None
    _targets: NDArray[np.int64] | None = None

    @property
    def targets(self) -> NDArray[np.int64]:
        """Tokens of each document that are predicted, `[D]`."""
        return self.length - 1 if self._targets is None else self._targets

    def __len__(self) -> int:
        return len(self.length)

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.length.sum())

    @property
    def bytes_per_target(self) -> float:
        """Bytes of text for each token that is predicted."""
        targets = int(self.targets.sum())
        return float(self.size.sum()) / targets if targets else 1.0

    def __getitem__(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> "Documents":
        """Some of the documents, by a mask or indices."""
        parts = (self.array[chosen], self.start[chosen], self.length[chosen], self.size[chosen])
        targets = None if self._targets is None else self._targets[chosen]
        return Documents(self.arrays, *parts, self.learned, targets)

    def read(self, document: int, start: int, stop: int) -> NDArray[np.unsignedinteger]:
        """Tokens of one document from `start` to before `stop`."""
        first = self.start[document]
        return self.arrays[self.array[document]][first + start : first + stop]

    def read_learned(self, document: int, start: int, stop: int) -> NDArray[np.bool_]:
        """Which tokens of such a stretch are learned; of documents that have parts."""
        assert self.learned is not None
        first = self.start[document]
        return self.learned[self.array[document]][first + start : first + stop]

    def cut(self, fraction: float) -> tuple["Documents", "Documents"]:
        """One document as two: its end is `fraction` of its tokens, and at least one."""
        (length,) = self.length
        tail = max(1, round(int(length) * fraction))
        sizes = self.size - self.size * tail // length, self.size * tail // length
        return (
            Documents(self.arrays, self.array, self.start, self.length - tail, sizes[0]),
            Documents(
                self.arrays,
                self.array,
                self.start + length - tail,
                self.length * 0 + tail,
                sizes[1],
            ),
        )


def tokenize(
    texts: Sequence[bytes], tokenizer: Tokenizer, encoder: Encoder | None = None
) -> Documents:
    """Documents in memory.

    Args:
      texts: the documents.
      tokenizer: of them.
      encoder: for documents with parts; None: they are plain texts.

    Raises:
      RunError: text that the tokenizer cannot take.
    """
    small = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    arrays, sizes, learned = [], [], []
    for example in (encoder or texts_encoder(tokenizer))(texts):
        arrays.append(example.tokens.astype(small))
        sizes.append(example.size)
        if example.learned is not None:
            learned.append(example.learned)
    lengths = np.array([len(tokens) for tokens in arrays], np.int64)
    together: NDArray[np.unsignedinteger] = np.concatenate([np.empty(0, small), *arrays])
    whole = np.concatenate([np.empty(0, np.bool_), *learned])
    return Documents(
        [together],
        np.zeros(len(lengths), np.int32),
        np.cumsum(lengths) - lengths,
        lengths,
        np.array(sizes, np.int64),
        [whole] if encoder is not None and learned else None,
        np.array([x[1:].sum() for x in learned], np.int64) if learned else None,
    )


def texts_encoder(tokenizer: Tokenizer) -> Encoder:
    """The encoder of plain texts."""

    def encode(texts: Sequence[bytes]) -> Iterator[Example]:
        for tokens, text in tokens_of(texts, tokenizer):
            yield Example(tokens, bytes_of_targets(tokens, text, tokenizer))

    return encode


def bytes_of_targets(tokens: NDArray[np.uint32], text: bytes, tokenizer: Tokenizer) -> int:
    """Bytes of a document's text that its tokens but the first stand for.

    A first token that is a part of a character shows as more bytes than it has.
    """
    return max(0, len(text) - tokenizer.bytes_of_first(tokens))


def tokens_of(
    texts: Sequence[bytes], tokenizer: Tokenizer
) -> Iterator[tuple[NDArray[np.uint32], bytes]]:
    """Tokens of each text that has any, with the text."""
    for several in batched(texts, _TOGETHER):
        for tokens, text in zip(tokenizer.encode_documents(several), several, strict=True):
            if len(tokens):
                yield tokens, text
