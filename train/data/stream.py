"""Documents that come one after another: a Hugging Face data set, shuffled and packed by Grain."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, override

import grain
import numpy as np
from grain.experimental import (
    ConcatThenSplitIterDataset,
    FlatMapIterDataset,
    FlatMapTransform,
    WindowShuffleIterDataset,
)
from numpy.typing import NDArray

from mdn_jax.errors import RunError
from mdn_jax.extras import install
from mdn_jax.models.loss import IGNORED
from mdn_jax.text.corpus import digest_of, place
from mdn_jax.text.files import reason_of
from mdn_jax.text.tokenizer import Tokenizer
from train.config_sections import DataConfig
from train.data.documents import Documents, Encoder, tokenize
from train.data.examples import fields_of, make_encoder
from train.data.packing import Batch

_TOKENS, _TARGETS = "tokens", "targets"
_TOGETHER = 32  # documents tokenised in one call


def open_stream(config: DataConfig) -> Any:
    """A streamed `datasets.IterableDataset` with the column of the text alone.

    Raises:
      RunError: no such data set, split or column, or no library to read it.
    """
    try:
        import datasets
    except ImportError:
        raise RunError(
            f"data.dataset: needs the datasets library: {install('huggingface')}"
        ) from None
    try:
        stream = datasets.load_dataset(
            os.path.expanduser(str(config.dataset)),
            config.subset,
            data_files=list(map(os.path.expanduser, config.files)) or None,
            split=config.split,
            revision=config.revision,
            streaming=True,
        )
        columns = stream.column_names or list(next(iter(stream), {}))
    except Exception as error:  # of the file system, the network and several libraries
        raise RunError(
            f"data.dataset: expected a data set with the split {config.split!r}, got "
            f"{config.dataset!r}: {reason_of(error)}"
        ) from None
    if not columns:
        raise RunError(f"data.dataset: expected documents in {config.dataset!r}, got none")
    for name in fields_of(config).names:
        if name not in columns:
            raise RunError(
                f"data.field: expected one of {sorted(columns)} (columns of {config.dataset}), "
                f"got {name!r}"
            )
    return stream.select_columns(list(fields_of(config).names))


def held_out_of_stream(
    stream: Any, config: DataConfig, tokenizer: Tokenizer, *, tokens: int
) -> tuple[Documents, str]:
    """The first documents of a stream that are held out.

    Args:
      stream: from `open_stream`, in its own order.
      config: the field, and the fraction that is held out.
      tokenizer: of the documents.
      tokens: as many as there have to be, or all that the stream has.

    Returns:
      The documents, and a digest of their texts: what a stream is known by.

    Raises:
      RunError: a stream that cannot be read, or without any.
    """
    texts: list[bytes] = []
    missing = tokens
    encoder = make_encoder(config, tokenizer)
    digest = hashlib.sha256()
    for text in _texts(iter(stream), config):
        if place(digest_of(text)) < config.held_out_fraction:
            texts.append(text)
            digest.update(digest_of(text))
            missing -= sum(len(example.tokens) for example in encoder([text]))
            if missing <= 0:
                break
    documents = tokenize(texts, tokenizer, encoder)
    if not len(documents):
        raise RunError(
            f"data.held_out_fraction: expected documents of {config.dataset} that are held out, "
            f"got none at {config.held_out_fraction}"
        )
    return documents, digest.hexdigest()


def packed_stream(
    stream: Any,
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    seed: int,
    part: int,
    parts: int,
) -> grain.IterDataset[Any]:
    """Rows of one process's part of a stream, without an end.

    Documents are shuffled within windows of `data.shuffle_buffer`, which may reach into the next
    pass, and the files of the data set among themselves; every pass has an order of its own.

    Args:
      stream: from `open_stream`.
      config: of the data.
      tokenizer: of the documents.
      sequence_length: tokens in a row.
      seed: of the order.
      part: the process's part of the stream.
      parts: that it is cut into.
    """
    from datasets.distributed import split_dataset_by_node

    mine = split_dataset_by_node(stream, rank=part, world_size=parts)
    texts = _TextStream(mine, config, seed)
    shuffled = WindowShuffleIterDataset(texts, window_size=config.shuffle_buffer, seed=seed)
    together = shuffled.batch(_TOGETHER, batch_fn=list)
    documents = FlatMapIterDataset(together, _ToDocuments(make_encoder(config, tokenizer)))
    lengths = dict.fromkeys((_TOKENS, _TARGETS), sequence_length)
    packed = ConcatThenSplitIterDataset(documents, length_struct=lengths)
    return packed.map(_to_row)


def from_json(state: Any) -> Any:
    """The state of an iterator of `packed_stream` that has been JSON.

    Grain knows the absence of a remainder by a pair that has to be a tuple.
    """
    if isinstance(state, list):
        return [from_json(value) for value in state]
    if not isinstance(state, dict):
        return state
    values = {key: from_json(value) for key, value in state.items()}
    if "remainder_slices" in values:
        slices = values["remainder_slices"]
        values["remainder_slices"] = {key: tuple(pair) for key, pair in slices.items()}
    return values


class _ToDocuments(FlatMapTransform):
    """Tokens and targets of several documents, which the library makes in threads."""

    max_fan_out = _TOGETHER

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    @override
    def flat_map(self, element: list[bytes]) -> list[dict[str, NDArray[np.int32]]]:
        found = []
        for example in self._encoder(element):
            tokens = example.tokens.astype(np.int32)
            # a document's last token predicts nothing
            targets = np.append(tokens[1:], np.int32(IGNORED))
            if example.learned is not None:
                targets[:-1][~example.learned[1:]] = IGNORED
            found.append({_TOKENS: tokens, _TARGETS: targets})
        return found


def _to_row(packed: Mapping[str, NDArray[np.int32]]) -> Batch:
    return Batch(
        tokens=packed[_TOKENS],
        segment_ids=packed[f"{_TOKENS}_segment_ids"],
        targets=packed[_TARGETS],
    )


def _texts(records: Iterator[Mapping[str, Any]], config: DataConfig) -> Iterator[bytes]:
    """The texts of records, without empty ones."""
    count = 0
    while True:
        try:
            record = next(records)
        except StopIteration:
            return
        except Exception as error:  # of the file system, the network and several libraries
            raise RunError(
                f"data.dataset: expected readable records in {config.dataset}, got after {count} "
                f"of them: {reason_of(error)}"
            ) from error
        try:
            text = _text(record, config)
        except ValueError as error:
            raise RunError(f"data.field: {error} in record {count} of {config.dataset}") from None
        count += 1
        if text:
            yield text


def _text(record: Mapping[str, Any], config: DataConfig) -> bytes:
    fields = fields_of(config)
    if not fields.are_parts and isinstance(record[config.field], bytes):
        text: bytes = record[config.field]
        return text
    return fields.document(record)


class _TextStream(grain.IterDataset[bytes]):
    """The texts to train on, pass after pass."""

    def __init__(self, stream: Any, config: DataConfig, seed: int) -> None:
        super().__init__()
        self._stream, self._config, self._seed = stream, config, seed

    @override
    def __iter__(self) -> "_TextIterator":
        return _TextIterator(self._stream, self._config, self._seed)


class _TextIterator(grain.DatasetIterator[bytes]):
    """Its position is the number of the pass, and the library's own position in it."""

    def __init__(self, stream: Any, config: DataConfig, seed: int) -> None:
        super().__init__()
        self._stream, self._config, self._seed = stream, config, seed
        self._start(0, None)

    def _start(self, number: int, position: dict[str, Any] | None) -> None:
        self._pass, self._position, self._read = number, position, False
        self._any = position is not None  # of the documents of this pass
        # what the library draws the order of the files from, where it is not 0
        order = np.random.default_rng((self._seed, 2, number)).integers(1, 1 << 31)
        self._stream.set_epoch(int(order))
        self._stream.load_state_dict(position)  # None: the beginning
        self._texts = _texts(iter(self._stream), self._config)

    @override
    def __next__(self) -> bytes:
        while True:
            for text in self._texts:
                self._read = True
                if place(digest_of(text)) >= self._config.held_out_fraction:
                    self._any = True
                    return text
            if not self._any:
                raise RunError(
                    f"data.dataset: expected documents to train on in {self._config.dataset}, got "
                    "none in a whole pass of this process"
                )
            self._start(self._pass + 1, None)

    @override
    def get_state(self) -> dict[str, Any]:
        position = self._stream.state_dict() if self._read else self._position
        return {"pass": self._pass, "stream": position}

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        self._start(state["pass"], state["stream"])
