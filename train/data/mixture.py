"""Rows of several sources, in proportion to their weights, mixed by Grain."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import grain
import numpy as np
from numpy.typing import NDArray

from train.data.packing import Batch, PackedRows

_ROWS = 1 << 50  # more than anyone takes


class MixedRows:
    """Batches of packed documents of several sources, addressed by step as of `PackedRows`.

    Which source the next row is of is Grain's choice, a pure function of the row's number that
    keeps the proportions at every row. Each source counts its own epochs.
    """

    def __init__(
        self, sources: Sequence[PackedRows], weights: Sequence[float], *, batch_size: int
    ) -> None:
        """Mixes sources.

        Args:
          sources: rows of each.
          weights: share of the rows, any positive numbers.
          batch_size: rows in a batch, `B`.
        """
        self._sources, self._batch_size = sources, batch_size
        numbers = [grain.MapDataset.range(_ROWS).map(_Tagged(i)) for i in range(len(sources))]
        self._mixed = grain.MapDataset.mix(numbers, weights)

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of a step; arguments as of `PackedRows.batch`."""
        positions = step * self._batch_size + np.arange(self._batch_size)[rows]
        drawn = np.array([self._mixed[int(position)] for position in positions], np.int64)
        parts: dict[int, Batch] = {}
        for i in np.unique(drawn[:, 0]):
            parts[int(i)] = self._sources[i].at(drawn[drawn[:, 0] == i, 1])
        return _scattered(drawn[:, 0], parts)


class _Tagged:
    """The number of a row with that of its source."""

    def __init__(self, source: int) -> None:
        self._source = source

    def __call__(self, row: int) -> tuple[int, int]:
        return self._source, row


def _scattered(source: NDArray[np.int64], parts: Mapping[int, Batch]) -> Batch:
    """The rows of each source where it was drawn."""
    first: Any = next(iter(parts.values()))
    batch = {}
    for key, x in first.items():
        batch[key] = np.empty((len(source), *x.shape[1:]), x.dtype)
        for i, part in parts.items():
            whole: Any = part
            batch[key][source == i] = whole[key]
    return cast(Batch, batch)


def shares(weights: Sequence[float]) -> list[float]:
    """The share of each source in the rows: what Grain makes of weights, to 1 % of the smallest."""
    hundredths = [int(100 / min(weights) * weight) for weight in weights]
    return [x / sum(hundredths) for x in hundredths]


class _RowsOfPart:
    """One process's rows of a source, by their number, for Grain."""

    def __init__(self, rows: PackedRows, part: int, parts: int) -> None:
        self._rows, self._part, self._parts = rows, part, parts

    def __len__(self) -> int:
        return _ROWS // self._parts

    def __getitem__(self, number: int) -> Any:
        batch: Any = self._rows.at(np.array([int(number) * self._parts + self._part]))
        return {key: x[0] for key, x in batch.items()}


def rows_of_part(rows: PackedRows, part: int, parts: int) -> grain.IterDataset[Any]:
    """Rows of a source one after another, for a mixture with streams."""
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return grain.MapDataset.source(_RowsOfPart(rows, part, parts)).to_iter_dataset(options)
