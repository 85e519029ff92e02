"""Losses of single tokens, and the rows of text that they are measured on."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import batched
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray

from mdn_jax.errors import RunError
from mdn_jax.models import MDNForCausalLM
from mdn_jax.models.loss import IGNORED
from mdn_jax.models.loss import token_losses as losses_of_targets


class Row(NamedTuple):
    """Tokens of one row, at most as many as its batch is wide.

    Attributes:
      tokens: inputs, `[T]`.
      targets: next tokens, `[T]`; -100 where none is scored.
      documents: document of each token; a change starts one; None: one.
      place: what the row is in an error; None: its number.
    """

    tokens: NDArray[np.int32]
    targets: NDArray[np.int32]
    documents: NDArray[np.int32] | None = None
    place: str | None = None


def row_after(tokens: Sequence[int], context: int, place: str) -> Row:
    """A row of which the tokens after the first `context`, at least 1, are targets."""
    inputs, targets = np.asarray(tokens[:-1], np.int32), np.asarray(tokens[1:], np.int32)
    targets[: context - 1] = IGNORED
    return Row(inputs, targets, place=place)


def width_of(rows: Iterable[Row]) -> int:
    """A width for all rows: a multiple of 64, so that few shapes are compiled."""
    return -(-max(len(row.tokens) for row in rows) // 64) * 64


def token_losses(
    model: MDNForCausalLM, rows: Iterable[Row], *, batch_size: int, width: int
) -> Iterator[NDArray[np.float32]]:
    """Losses of the targets of rows, in nats; 0 where there is none.

    Args:
      model: the model.
      rows: of at most `width` tokens; they are padded to it.
      batch_size: rows in one call.
      width: tokens of a row, so that one shape is compiled.

    Yields:
      The losses of each row, `[T]`, in the order of the rows.

    Raises:
      RunError: losses that are not finite, which no figure may hide.
    """
    graph, weights = nnx.split(model)

    def losses(first: int, batch: Sequence[Row]) -> Iterator[NDArray[np.float32]]:
        tokens = np.zeros((batch_size, width), np.int32)
        documents = np.zeros((batch_size, width), np.int32)
        targets = np.full((batch_size, width), IGNORED, np.int32)
        for i, row in enumerate(batch):
            count = len(row.tokens)
            tokens[i, :count], targets[i, :count] = row.tokens, row.targets
            if row.documents is not None:
                documents[i, :count] = row.documents
                documents[i, count:] = row.documents[-1]
        out = np.asarray(_losses(graph, weights, tokens, documents, targets))
        for i, row in enumerate(batch):
            loss = out[i, : len(row.tokens)]
            odd = loss[~np.isfinite(loss)]
            if odd.size:
                raise RunError(
                    f"{row.place or f'rows[{first + i}]'}: expected finite log-likelihoods of the "
                    f"model, got {odd[0]}"
                )
            yield loss

    for number, batch in enumerate(batched(rows, batch_size)):
        yield from losses(number * batch_size, batch)


@partial(jax.jit, static_argnums=0)
def _losses(
    graph: Any,
    weights: Any,
    tokens: Int[Array, "B T"],
    documents: Int[Array, "B T"],
    targets: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    model = nnx.merge(graph, weights)
    h, _ = model.hidden(tokens, segment_ids=documents)
    return losses_of_targets(h, model.output_kernel(), targets)


def packed_rows(documents: Sequence[Sequence[int]], *, width: int) -> list[Row]:
    """Rows cut from the concatenated documents, which never see each other.

    Every token but a document's first is a target once; the first of a row that continues a
    document is the last target of the row before.
    """
    tokens = np.concatenate([np.asarray(document, np.int32) for document in documents])
    numbers = np.repeat(np.arange(len(documents), dtype=np.int32), list(map(len, documents)))
    targets = np.where(numbers[1:] == numbers[:-1], tokens[1:], IGNORED)
    return [
        Row(
            tokens[i : min(i + width, len(targets))],
            targets[i : i + width],
            numbers[i : min(i + width, len(targets))],
        )
        for i in range(0, len(targets), width)
    ]


def strided_rows(documents: Sequence[Sequence[int]], *, width: int, stride: int) -> Iterator[Row]:
    """Windows over each document: every target once, after the first window with context.

    Args:
      documents: their tokens.
      width: of a window.
      stride: targets in a window after the first, so that each has at least `width - stride`
        tokens of context before it.
    """
    for document in documents:
        tokens = np.asarray(document, np.int32)
        inputs, targets = tokens[:-1], tokens[1:]
        scored = 0
        for start in range(0, len(inputs), stride):
            stop = min(start + width, len(inputs))
            window = np.where(np.arange(start, stop) >= scored, targets[start:stop], IGNORED)
            yield Row(inputs[start:stop], window.astype(np.int32))
            scored = stop
            if stop == len(inputs):
                break
