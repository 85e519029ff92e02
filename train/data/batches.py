"""From a configuration to batches: what a run trains on, one step after another."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grain
from grain.experimental import ThreadPrefetchIterDataset

from mdn_jax.errors import RunError
from mdn_jax.text.corpus import load_corpus
from mdn_jax.text.files import Format, find_files
from mdn_jax.text.tokenizer import (
    BYTES,
    TOKENIZER_FILE,
    ByteTokenizer,
    Tokenizer,
    make_tokenizer,
)
from train.config import TrainConfig
from train.config_sections import DataConfig
from train.data.documents import Documents, tokenize
from train.data.packing import Batch, PackedRows, held_out_batches
from train.data.shards import open_shards, read_header
from train.data.stream import from_json, held_out_of_stream, open_stream, packed_stream
from train.parallel.distributed import from_all
from train.parallel.sharding import Share

_THREADS = 2  # that cut rows
_STEPS = 1 << 40  # more than anyone takes
_UNNAMED = """data: expected documents to train on, got none; add one of these, for example:
    --data.files 'texts/**/*.txt'    (text, JSONL, Parquet, directories of them, shards)
    --data.dataset NAME              (of Hugging Face, as a stream)"""


@dataclass(frozen=True)
class TrainingData:
    """The documents of a run as batches.

    Attributes:
      tokenizer: of the tokens.
      held_out: batches that the held-out loss is measured on.
      bytes_per_token: bytes of text for each token that is predicted, of the held-out documents.
      fingerprint: digest of the documents; of a stream, of its name and the held-out ones.
      size: what there is to train on, in words.
      dataset: batches of a process's share, without an end.
      streamed: whether the position is more than the number of steps.
    """

    tokenizer: Tokenizer
    held_out: list[Batch]
    bytes_per_token: float
    fingerprint: str
    size: str
    dataset: Callable[[Share], grain.IterDataset[Batch]]
    streamed: bool

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


@dataclass(frozen=True)
class Source:
    """What a configuration names, found and not read yet.

    Attributes:
      files: from `find_files`; none of a stream.
      tokenizer: of the documents.
    """

    files: list[tuple[Path, Format]]
    tokenizer: Tokenizer

    @property
    def shards(self) -> list[Path]:
        """The files where they are shards of tokens; else none."""
        return [path for path, format in self.files if format == "tokens"]


def find_source(config: DataConfig) -> Source:
    """The files that a configuration names, and its tokenizer: that of shards is beside them.

    Raises:
      RunError: no names, names that match no file, or a tokenizer that cannot be used.
    """
    if not (config.files or config.dataset is not None or config.standard_library):
        raise RunError(_UNNAMED)
    files = [] if config.dataset is not None else find_files(config)
    choice = config.tokenizer
    if files and files[0][1] == "tokens":
        path, _ = files[0]
        header = read_header(path)
        if choice is None and header.tokenizer != BYTES:
            choice = str(path.parent / TOKENIZER_FILE)
    return Source(files, make_tokenizer(choice, config.start_token))


def load_data(config: TrainConfig, source: Source | None = None) -> TrainingData:
    """Opens what a configuration names.

    Args:
      config: of the run.
      source: from `find_source`; None: to be found here.

    Raises:
      RunError: data that cannot be used, or shards of another tokenizer.
    """
    source = source or find_source(config.data)
    tokenizer = source.tokenizer
    if config.data.dataset is not None:
        return _streamed(config, tokenizer)
    if source.shards:
        train, held_out, fingerprint = open_shards(
            source.shards,
            tokenizer,
            held_out_fraction=config.data.held_out_fraction,
            verify=config.data.verify,
        )
    else:
        utf8 = not isinstance(tokenizer, ByteTokenizer)
        corpus = load_corpus(config.data, files=source.files, utf8=utf8)
        train, held_out = (tokenize(texts, tokenizer) for texts in (corpus.train, corpus.held_out))
        fingerprint = corpus.fingerprint
    rows = PackedRows(
        train,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        seed=config.seed,
    )

    def dataset(share: Share) -> grain.IterDataset[Batch]:
        options = grain.ReadOptions(
            num_threads=min(_THREADS, config.data.prefetch),
            prefetch_buffer_size=config.data.prefetch,
        )
        mine = _Steps(rows, share.rows(config.batch_size))
        return grain.MapDataset.source(mine).to_iter_dataset(options)

    return TrainingData(
        tokenizer=tokenizer,
        held_out=_held_out(config, held_out),
        bytes_per_token=held_out.bytes_per_target,
        fingerprint=fingerprint,
        size=f"{train.tokens:,} tokens to train on",
        dataset=dataset,
        streamed=False,
    )


class _Steps:
    """Batches by the number of their step, as a source of Grain's."""

    def __init__(self, rows: PackedRows, mine: slice) -> None:
        self._rows, self._mine = rows, mine

    def __len__(self) -> int:
        return _STEPS

    def __getitem__(self, step: int) -> Batch:
        return self._rows.batch(step, self._mine)


def _streamed(config: TrainConfig, tokenizer: Tokenizer) -> TrainingData:
    stream = open_stream(config.data)
    tokens = config.eval_rows * config.sequence_length + 1
    held_out, fingerprint = held_out_of_stream(stream, config.data, tokenizer, tokens=tokens)

    def dataset(share: Share) -> grain.IterDataset[Batch]:
        packed = packed_stream(
            stream,
            config.data,
            tokenizer,
            rows=config.batch_size // share.parts,
            sequence_length=config.sequence_length,
            seed=config.seed,
            part=share.part,
            parts=share.parts,
        )
        return ThreadPrefetchIterDataset(packed, prefetch_buffer_size=config.data.prefetch)

    return TrainingData(
        tokenizer=tokenizer,
        held_out=_held_out(config, held_out),
        bytes_per_token=held_out.bytes_per_target,
        fingerprint=fingerprint,
        size=f"documents of {config.data.dataset} as they come",
        dataset=dataset,
        streamed=True,
    )


def _held_out(config: TrainConfig, documents: Documents) -> list[Batch]:
    return held_out_batches(
        documents,
        batch_size=config.batch_size // config.accumulation,
        sequence_length=config.sequence_length,
        max_rows=config.eval_rows,
    )
