"""From a configuration to batches: what a run trains on, one step after another."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

import grain
from grain.experimental import ThreadPrefetchIterDataset

from mdn_jax.errors import RunError
from mdn_jax.saved.digest import json_digest
from mdn_jax.text.tokenizer import ByteTokenizer, Tokenizer
from train.config import TrainConfig
from train.data.documents import Documents
from train.data.examples import chat_template
from train.data.mixture import MixedRows, rows_of_part, shares
from train.data.packing import Batch, PackedRows, held_out_batches
from train.data.sources import Found, Source, find_source, open_documents
from train.data.stream import from_json, held_out_of_stream, open_stream, packed_stream
from train.parallel.distributed import from_all
from train.parallel.sharding import Share

_THREADS = 2  # that cut rows
_STEPS = 1 << 40  # more than anyone takes


@dataclass(frozen=True)
class TrainingData:
    """The documents of a run as batches.

    Attributes:
      tokenizer: of the tokens.
      held_out: batches that the held-out loss is measured on.
      held_out_places: where those of each source of a mixture are among them; {} of one source.
      bytes_per_token: bytes of text for each token that is predicted, of the held-out documents.
      fingerprint: digest of the documents; of a stream, of its name and the held-out ones.
      size: what there is to train on, in words.
      dataset: batches of a process's share, without an end.
      streamed: whether the position is more than the number of steps.
      chat_template: that makes text of chats; None: there are none.
      epochs: of files and shards, how much of an epoch a step is, by the name in the metrics.
    """

    tokenizer: Tokenizer
    held_out: list[Batch]
    held_out_places: dict[str, slice]
    bytes_per_token: float
    fingerprint: str
    size: str
    dataset: Callable[[Share], grain.IterDataset[Batch]]
    streamed: bool
    chat_template: str | None
    epochs: dict[str, float]

    @property
    def unit(self) -> str:
        """Of the loss."""
        return "nats/byte" if isinstance(self.tokenizer, ByteTokenizer) else "nats/token"

    def batches(self, share: Share, position: dict[str, Any] | None = None) -> "Batches":
        """The batches of a process from a position (`Batches.position`) on; None: the start.

        Raises:
          RunError: the position of another number of processes in a stream.
        """
        step = 0 if position is None else int(position["step"])
        state: dict[str, Any] | None = {"next_index": step}
        if self.streamed:
            parts = [None] * share.parts if position is None else position.get("parts", [])
            if len(parts) != share.parts:
                raise RunError(
                    f"distributed: expected the {len(parts)} parts that the checkpoint's stream of "
                    f"documents is in, one for each process, got {share.parts}; only files and "
                    "shards can be continued with another number"
                )
            state = from_json(parts[share.part])
        return Batches(self, share, step, state)


class Batches:
    """A process's rows of every step, prepared ahead; a context manager that ends the threads.

    Attributes:
      waited: seconds spent in waiting for batches.
    """

    def __init__(
        self, data: TrainingData, share: Share, step: int, state: dict[str, Any] | None
    ) -> None:
        """Starts the threads.

        Args:
          data: what to train on.
          share: of the process.
          step: steps taken.
          state: of Grain's iterator; None: the start.
        """
        self._data, self._share, self._step = data, share, step
        self._iterator = iter(data.dataset(share))
        self.waited = 0.0
        if state is not None:
            self._iterator.set_state(state)
        self._iterator.start_prefetch()

    def __next__(self) -> Batch:
        began = time.perf_counter()
        batch = next(self._iterator)
        self._step += 1
        self.waited += time.perf_counter() - began
        return batch

    def position(self) -> dict[str, Any]:
        """Where to go on, in JSON values; every process makes the call, and gets the same."""
        if not self._data.streamed:
            return {"step": self._step}
        states = dict(from_all((self._share.part, self._iterator.get_state())))
        return {"step": self._step, "parts": [states[part] for part in range(self._share.parts)]}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._iterator.close()


class _Part(NamedTuple):
    """A source, opened.

    Attributes:
      found: what it is.
      rows: of files and shards; None of a stream.
      stream: rows of a process's part of a stream.
      held_out: documents.
      fingerprint: digest of the documents; of a stream, of the held-out ones.
      size: what there is to train on, in words.
    """

    found: Found
    rows: PackedRows | None
    stream: Callable[[Share], grain.IterDataset[Any]] | None
    held_out: Documents
    fingerprint: str
    size: str

    def rows_of(self, share: Share) -> grain.IterDataset[Any]:
        """One row after another, for a mixture with streams."""
        if self.rows is not None:
            return rows_of_part(self.rows, share.part, share.parts)
        assert self.stream is not None
        return self.stream(share)


def load_data(config: TrainConfig, source: Source | None = None) -> TrainingData:
    """Opens what a configuration names.

    Args:
      config: of the run.
      source: from `find_source`; None: to be found here.

    Raises:
      RunError: data that cannot be used, or shards of another tokenizer.
    """
    found, tokenizer = source or find_source(config.data)
    chats = [part.config for part in found if part.config.messages is not None]
    template = chat_template(chats[0], tokenizer).source if chats else None
    parts = [_named(part, config, tokenizer) for part in found]
    weights = shares([part.weight for part in found])
    held_out: list[Batch] = []
    places = {}
    for part, weight in zip(parts, weights, strict=True):
        batches = _held_out(config, part, max(1, round(config.eval_rows * weight)))
        if part.found.name:
            places[part.found.name] = slice(len(held_out), len(held_out) + len(batches))
        held_out += batches
    sizes = [f"{part.found.name} {part.size}".strip() for part in parts]
    return TrainingData(
        tokenizer=tokenizer,
        held_out=held_out,
        held_out_places=places,
        bytes_per_token=sum(
            weight * part.held_out.bytes_per_target
            for part, weight in zip(parts, weights, strict=True)
        ),
        fingerprint=_fingerprint(parts, template),
        size=" + ".join(sizes),
        dataset=_dataset(config, parts),
        streamed=any(part.rows is None for part in parts),
        chat_template=template,
        epochs={
            f"epoch/{part.found.name}".removesuffix("/"): weight
            * config.batch_size
            / part.rows.rows
            for part, weight in zip(parts, weights, strict=True)
            if part.rows is not None
        },
    )


def _fingerprint(parts: Sequence[_Part], template: str | None) -> str:
    """Of a mixture, that of its sources with their weights; of chats with their template."""
    if len(parts) == 1 and not parts[0].found.name and template is None:
        return parts[0].fingerprint
    values = [[part.found.name, part.found.weight, part.fingerprint] for part in parts]
    return json_digest([template, *values])


def _named(found: Found, config: TrainConfig, tokenizer: Tokenizer) -> _Part:
    """Opens a source, with its name in errors."""
    try:
        return _open(found, config, tokenizer)
    except RunError as error:
        raise RunError(f"{found.name}: {error}" if found.name else str(error)) from None


def _open(found: Found, config: TrainConfig, tokenizer: Tokenizer) -> _Part:
    data = found.config
    if data.dataset is None:
        train, held_out, fingerprint = open_documents(found, tokenizer)
        rows = PackedRows(
            train,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            seed=config.seed,
        )
        size = f"{train.tokens:,} tokens to train on"
        return _Part(found, rows, None, held_out, fingerprint, size)
    stream = open_stream(data)
    tokens = config.eval_rows * config.sequence_length + 1
    held_out, fingerprint = held_out_of_stream(stream, data, tokenizer, tokens=tokens)

    def of_share(share: Share) -> grain.IterDataset[Any]:
        return packed_stream(
            stream,
            data,
            tokenizer,
            sequence_length=config.sequence_length,
            seed=config.seed,
            part=share.part,
            parts=share.parts,
        )

    size = f"documents of {data.dataset} as they come"
    return _Part(found, None, of_share, held_out, fingerprint, size)


def _dataset(
    config: TrainConfig, parts: Sequence[_Part]
) -> Callable[[Share], grain.IterDataset[Batch]]:
    """Batches of a process's share: by their number, or with a stream one after another."""
    weights = [part.found.weight for part in parts]
    packed = [part.rows for part in parts if part.rows is not None]
    prefetch = config.data.prefetch
    if len(packed) == len(parts):
        size = config.batch_size
        rows = packed[0] if len(parts) == 1 else MixedRows(packed, weights, batch_size=size)

        def by_number(share: Share) -> grain.IterDataset[Batch]:
            options = grain.ReadOptions(
                num_threads=min(_THREADS, prefetch), prefetch_buffer_size=prefetch
            )
            mine = _Steps(rows, share.rows(size))
            return grain.MapDataset.source(mine).to_iter_dataset(options)

        return by_number

    def one_by_one(share: Share) -> grain.IterDataset[Batch]:
        each = [part.rows_of(share) for part in parts]
        mixed = each[0] if len(each) == 1 else grain.IterDataset.mix(each, weights)
        batches = mixed.batch(config.batch_size // share.parts)
        return ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)

    return one_by_one


class _Steps:
    """Batches by the number of their step, as a source of Grain's."""

    def __init__(self, rows: PackedRows | MixedRows, mine: slice) -> None:
        self._rows, self._mine = rows, mine

    def __len__(self) -> int:
        return _STEPS

    def __getitem__(self, step: int) -> Batch:
        return self._rows.batch(step, self._mine)


def _held_out(config: TrainConfig, part: _Part, rows: int) -> list[Batch]:
    return held_out_batches(
        part.held_out,
        batch_size=config.batch_size // config.accumulation,
        sequence_length=config.sequence_length,
        max_rows=rows,
    )
