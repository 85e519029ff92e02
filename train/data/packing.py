"""Fixed-length rows cut from the concatenated documents; a batch is a function of its step."""

from collections.abc import Iterable
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from mdn_jax.errors import RunError
from mdn_jax.models.loss import IGNORED
from train.data.documents import Documents


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
    `sequence_length` tokens. Every epoch visits every row once, in an order of its own. A batch
    depends on nothing that was asked for before, so a run that resumes at a step sees what an
    uninterrupted one would.

    Attributes:
      tokens: tokens of all documents.
      rows: rows of an epoch.
    """

    def __init__(
        self, documents: Documents, *, batch_size: int, sequence_length: int, seed: int
    ) -> None:
        """Lays the documents out one behind the other, where they are.

        Args:
          documents: to pack, at least `sequence_length + 1` tokens together.
          batch_size: rows in a batch, `B`.
          sequence_length: tokens in a row, `T`.
          seed: of the order of documents and rows.

        Raises:
          RunError: too little text for one row.
        """
        self._batch_size, self._seed = batch_size, seed
        order = np.random.default_rng((seed, 0)).permutation(len(documents))
        self._packed = _Packed(documents[order], sequence_length)
        self._orders: dict[int, NDArray[np.int64]] = {}  # of the epochs around the last batch
        self.tokens = documents.tokens
        self.rows = self._packed.rows
        if not self.rows:
            raise RunError(
                f"data.files: expected at least sequence_length + 1 = {sequence_length + 1} tokens "
                f"of text to train on, got {self.tokens}"
            )
        if not documents.targets.any():
            raise RunError(
                "data.files: expected documents to train on of more than one token, got "
                f"{len(documents)} of one: there is nothing to predict"
            )

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of a step: a pure function of the documents, seed and step.

        Args:
          step: from 0.
          rows: of the batch; all of them if not given.
        """
        return self.at(step * self._batch_size + np.arange(self._batch_size)[rows])

    def at(self, position: NDArray[np.int64]) -> Batch:
        """The rows of some positions in all epochs, one behind the other, from 0."""
        epoch, index = np.divmod(position, self.rows)
        row = np.empty_like(index)
        for number in np.unique(epoch):
            row[epoch == number] = self._order_of(int(number))[index[epoch == number]]
        return self._packed.batch(row)

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        orders = self._orders  # several threads come here: what one of them has is not changed
        if epoch not in orders:
            order = np.random.default_rng((self._seed, 1, epoch)).permutation(self.rows)
            near = {e: o for e, o in orders.items() if abs(e - epoch) == 1}
            self._orders = orders = near | {epoch: order}
        return orders[epoch]


def held_out_batches(
    documents: Documents, *, batch_size: int, sequence_length: int, max_rows: int
) -> list[Batch]:
    """The fixed batches that the held-out loss is measured on.

    Args:
      documents: held out.
      batch_size: rows in a batch; the last batch is filled up with rows without targets.
      sequence_length: tokens in a row.
      max_rows: rows to use; where there are more, as many at even distances.

    Returns:
      The batches, in the order of the documents.

    Raises:
      RunError: documents in which there is nothing to predict.
    """
    packed = _Packed(documents, sequence_length)
    total = max(1, -(-(packed.extent - 1) // sequence_length))
    count = min(total, max_rows)
    filled = -(-count // batch_size) * batch_size
    rows = np.append(np.arange(count) * total // count, np.full(filled - count, total))
    batches = [packed.batch(rows[i : i + batch_size]) for i in range(0, filled, batch_size)]
    if all((batch["targets"] == IGNORED).all() for batch in batches):
        raise RunError(
            "data.held_out_fraction: expected held-out documents of more than one token, got "
            f"{len(documents)} of {documents.tokens} together: there is nothing to measure a loss "
            "on; hold out more, or name a data.start_token"
        )
    return batches


def unigram_entropy(batches: Iterable[Batch]) -> float:
    """Entropy of the targets' own frequencies, in nats/token.

    It is the lowest loss that a model without context could reach on exactly these targets.
    """
    targets = np.concatenate([batch["targets"].ravel() for batch in batches])
    counts = np.bincount(targets[targets != IGNORED])
    frequency = counts[counts > 0] / counts.sum()
    return float(-np.sum(frequency * np.log(frequency)))


class _Packed:
    """Documents one behind the other, cut into rows; behind the last there is nothing to see.

    Documents with parts are not cut where that can be helped, so that no answer is without its
    question: one that does not fit into the rest of a row begins the next, and what is left of
    the row is empty.

    Attributes:
      extent: tokens from the beginning to the last of all, what is empty included.
      rows: to train on: of documents with parts all, else all that are full.
    """

    def __init__(self, documents: Documents, sequence_length: int) -> None:
        self._documents, self._length = documents, sequence_length
        self._ends = np.cumsum(documents.length)
        if documents.learned is not None:
            self._ends = _whole_ends(documents.length, sequence_length)
        self._starts = self._ends - documents.length
        self.extent = int(self._ends[-1]) if len(documents) else 0
        left_out = 0 if documents.learned is None else sequence_length - 1
        self.rows = max(0, self.extent - 1 + left_out) // sequence_length

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        # neighbours share one token, which is a target only once
        tokens = np.zeros((len(rows), self._length + 1), np.int32)
        segments = np.zeros_like(tokens)
        learned = np.ones(tokens.shape, np.bool_)
        targets = np.full((len(rows), self._length), IGNORED, np.int32)
        for i, row in enumerate(rows):
            filled = self._fill(int(row) * self._length, tokens[i], segments[i], learned[i])
            inside = slice(0, max(0, filled - 1))
            same = (segments[i, 1:] == segments[i, :-1]) & learned[i, 1:]
            targets[i, inside] = np.where(same, tokens[i, 1:], IGNORED)[inside]
        return Batch(
            tokens=np.ascontiguousarray(tokens[:, :-1]),
            segment_ids=np.ascontiguousarray(segments[:, :-1]),
            targets=targets,
        )

    def _fill(
        self,
        position: int,
        tokens: NDArray[np.int32],
        segments: NDArray[np.int32],
        learned: NDArray[np.bool_],
    ) -> int:
        """One row from a position of the concatenated documents; how much of it there is."""
        document = int(np.searchsorted(self._ends, position, side="right"))
        filled = number = 0
        while filled < len(tokens) and document < len(self._ends):
            start = position + filled - int(self._starts[document])
            if start < 0:  # empty until the next document
                stretch = slice(filled, min(len(tokens), filled - start))
                learned[stretch] = False
            else:
                count = min(len(tokens) - filled, int(self._documents.length[document]) - start)
                stretch = slice(filled, filled + count)
                tokens[stretch] = self._documents.read(document, start, start + count)
                if self._documents.learned is not None:
                    learned[stretch] = self._documents.read_learned(document, start, start + count)
                document += 1
            segments[stretch] = number
            filled, number = stretch.stop, number + 1
        segments[filled:] = number
        return filled


def _whole_ends(lengths: NDArray[np.int64], row: int) -> NDArray[np.int64]:
    """Where documents end of which each that fits into a row lies in one."""
    ends = np.empty_like(lengths)
    end = 0
    for i, length in enumerate(lengths.tolist()):
        left = -end % row
        end += length if length <= left else left + length
        ends[i] = end
    return ends
