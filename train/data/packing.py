"""Fixed-length rows cut from the concatenated documents; a batch is a function of its step."""

from collections.abc import Iterable, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from train.errors import RunError
from train.tokenizer import DOCUMENT_START, VOCAB_SIZE, encode

IGNORED = -100


class Batch(TypedDict):
    """Arrays of one step, each `[B, T]` int32.

    `segment_ids` numbers the documents of a row from 0 or 1 upwards. `targets` is the next token of
    the same document, or -100 where there is none.
    """

    tokens: NDArray[np.int32]
    segment_ids: NDArray[np.int32]
    targets: NDArray[np.int32]


class PackedRows:
    """Batches of packed documents, addressed by step.

    The documents are shuffled and concatenated once; row `i` is the `i`-th stretch of
    `sequence_length` tokens. Every epoch visits every row once, in an order of its own. Nothing is
    kept between calls, so a run that resumes at a step sees what an uninterrupted one would.

    Attributes:
      tokens: tokens of all documents.
      rows: rows of an epoch.
    """

    def __init__(
        self, documents: Sequence[bytes], *, batch_size: int, sequence_length: int, seed: int
    ) -> None:
        """Lays the documents out as one array of tokens.

        Args:
          documents: texts to pack, at least `sequence_length + 1` tokens together.
          batch_size: rows in a batch, `B`.
          sequence_length: tokens in a row, `T`.
          seed: of the order of documents and rows.

        Raises:
          RunError: too little text for one row.
        """
        self._batch_size, self._length, self._seed = batch_size, sequence_length, seed
        order = np.random.default_rng((seed, 0)).permutation(len(documents))
        self._tokens = np.concatenate([encode(documents[i]) for i in order])
        self.tokens = len(self._tokens)
        self.rows = (self.tokens - 1) // sequence_length
        if not self.rows:
            raise RunError(
                f"data.files: expected at least sequence_length + 1 = {sequence_length + 1} tokens "
                f"of text to train on, got {self.tokens}"
            )

    def batch(self, step: int) -> Batch:
        """The batch of step `step` (from 0): a pure function of the documents, seed and step."""
        position = step * self._batch_size + np.arange(self._batch_size)
        epoch, index = np.divmod(position, self.rows)
        row = np.empty_like(index)
        for number in np.unique(epoch):
            order = np.random.default_rng((self._seed, 1, number)).permutation(self.rows)
            row[epoch == number] = order[index[epoch == number]]
        return _to_batch(_cut(self._tokens, row, self._length))


def held_out_batches(
    documents: Sequence[bytes], *, batch_size: int, sequence_length: int, max_rows: int
) -> list[Batch]:
    """The fixed batches that the held-out loss is measured on.

    Args:
      documents: held-out texts.
      batch_size: rows in a batch; the last batch is filled up with rows without targets.
      sequence_length: tokens in a row.
      max_rows: rows to use; where there are more, as many at even distances.

    Returns:
      The batches, in the order of the documents.
    """
    tokens = np.concatenate([encode(text) for text in documents])
    total = max(1, -(-(len(tokens) - 1) // sequence_length))
    filler = np.full(total * sequence_length + 1 - len(tokens), DOCUMENT_START, np.uint16)
    tokens = np.concatenate([tokens, filler])
    count = min(total, max_rows)
    rows = _cut(tokens, np.arange(count) * total // count, sequence_length)
    empty = np.full((-count % batch_size, sequence_length + 1), DOCUMENT_START, rows.dtype)
    rows = np.concatenate([rows, empty])
    return [_to_batch(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]


def unigram_entropy(batches: Iterable[Batch]) -> float:
    """Entropy of the targets' own byte frequencies, in nats/byte.

    It is the lowest loss that a model without context could reach on exactly these targets.
    """
    counts = np.zeros(VOCAB_SIZE, np.int64)
    for batch in batches:
        targets = batch["targets"]
        counts += np.bincount(targets[targets != IGNORED], minlength=VOCAB_SIZE)
    frequency = counts[counts > 0] / counts.sum()
    return float(-np.sum(frequency * np.log(frequency)))


def _cut(
    tokens: NDArray[np.uint16], rows: NDArray[np.int64], length: int
) -> NDArray[np.int32]:  # [B, T + 1]: neighbours share one token, which is a target only once
    return tokens[rows[:, None] * length + np.arange(length + 1)].astype(np.int32)


def _to_batch(rows: NDArray[np.int32]) -> Batch:
    tokens, following = rows[:, :-1], rows[:, 1:]
    return Batch(
        tokens=np.ascontiguousarray(tokens),
        segment_ids=np.cumsum(tokens == DOCUMENT_START, axis=1, dtype=np.int32),
        targets=np.where(following == DOCUMENT_START, IGNORED, following),
    )
