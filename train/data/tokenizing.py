"""Files to shards of tokens, in several processes, resumable."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mdn_jax.errors import RunError
from mdn_jax.text.files import SHARD_SUFFIX, find_files, reason_of, refuse_shards, shown
from mdn_jax.text.reading import Piece, cut_files, read_documents, reading
from mdn_jax.text.tokenizer import ByteTokenizer, Tokenizer, make_tokenizer
from train.config_sections import DataConfig
from train.data.documents import tokens_of
from train.data.shards import (
    Header,
    read_header,
    shard_name,
    unfinished_shards,
    write_shard,
)

_TOGETHER = 256  # documents tokenised in one call
_SECONDS = 0.2  # between looks at how far the processes are


class Work(NamedTuple):
    """What becomes one shard.

    Attributes:
      path: of the shard.
      pieces: of the files, in their order.
    """

    path: Path
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(piece.size for piece in self.pieces)


class Written(NamedTuple):
    """What a call of `write_shards` left.

    Attributes:
      headers: of all shards, in their order.
      before: how many of them were there already.
    """

    headers: list[Header]
    before: int


def write_shards(
    config: DataConfig, directory: Path, *, shard_bytes: int, processes: int
) -> Written:
    """Tokenises files into a directory; a call that was interrupted is continued by another.

    Args:
      config: files, their format and field, tokenizer.
      directory: for the shards, and the `tokenizer.json` of a tokenizer other than bytes.
      shard_bytes: of the files that go into one shard, about.
      processes: that work at the same time.

    Returns:
      The headers of the shards.

    Raises:
      RunError: files that cannot be used, or a directory of other shards.
    """
    directory = Path(os.path.expanduser(directory))
    tokenizer = make_tokenizer(config.tokenizer, config.start_token)
    files = find_files(config)
    refuse_shards(files)
    groups = list(_grouped(cut_files(files, size=shard_bytes), shard_bytes))
    names = [shard_name(i, len(groups)) for i in range(len(groups))]
    works = [Work(directory / name, tuple(g)) for name, g in zip(names, groups, strict=True)]
    source = _source(works, config, tokenizer)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        done = _done(directory, works, source)
        tokenizer.save(directory)
    except OSError as error:
        raise RunError(
            f"output: expected a directory to write to, got {shown(directory)}: {reason_of(error)}"
        ) from None
    left = [work for work in works if work.path not in done]
    total = sum(work.size for work in works)
    with tqdm(
        total=total,
        initial=total - sum(work.size for work in left),
        unit="B",
        unit_scale=True,
        disable=None,
    ) as bar:
        _run(left, config, source, processes, bar)
    headers = [read_header(work.path) for work in works]
    if not any(header.documents for header in headers):
        raise RunError(f"data.files: expected files with text in them, got {len(files)} without")
    return Written(headers, len(done))


def _grouped(pieces: Iterator[Piece], size: int) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    total = 0
    for piece in pieces:
        if group and total + piece.size > size:
            yield group
            group, total = [], 0
        group.append(piece)
        total += piece.size
    yield group


def _source(works: Sequence[Work], config: DataConfig, tokenizer: Tokenizer) -> str:
    """Digest of what is tokenised and how: the files by name, size and time."""
    parts: list[Any] = [tokenizer.fingerprint, tokenizer.vocab_size, config.field]
    for work in works:
        for piece in work.pieces:
            with reading(piece.path):
                stat = piece.path.stat()
            parts.append([*map(str, piece), stat.st_size, stat.st_mtime_ns])
        parts.append(None)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _done(directory: Path, works: Sequence[Work], source: str) -> set[Path]:
    """The shards that an earlier call finished; what it left unfinished is removed."""
    there = set(directory.glob(f"*{SHARD_SUFFIX}"))
    other = sorted(there - {work.path for work in works})
    other += [p for p in sorted(there - set(other)) if read_header(p).source != source]
    if other:
        raise RunError(
            f"output: expected a new directory, or one that a call with the same files, field, "
            f"tokenizer and shard size began, got {shown(directory)} with {shown(other[0].name)} "
            "of another call"
        )
    for path in unfinished_shards(directory):
        path.unlink()
    return there


@dataclass(frozen=True)
class _Shared:
    """What the processes have in common.

    Attributes:
      read: bytes of the files that were tokenised, over all processes.
      stop: set when there is no more to do.
    """

    read: Any
    stop: Any


_shared: _Shared


def _start_process(shared: _Shared) -> None:
    global _shared
    _shared = shared
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it would start as many threads in each process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # it was killed, and nobody else ends this process


def _run(works: Sequence[Work], config: DataConfig, source: str, processes: int, bar: tqdm) -> None:
    processes = min(processes, len(works))
    if processes <= 1:
        for work in works:
            _write(work, config, source, bar.update)
        return
    context = multiprocessing.get_context("spawn")
    shared = _Shared(context.Value("q", 0), context.Event())
    executor = ProcessPoolExecutor(processes, context, _start_process, (shared,))
    futures = {executor.submit(_write, work, config, source, _count) for work in works}
    read = 0
    try:
        while futures:
            done, futures = wait(futures, _SECONDS, FIRST_EXCEPTION)
            read, before = shared.read.value, read
            bar.update(read - before)
            for future in done:
                future.result()
    except BrokenProcessPool:
        raise RunError(
            "processes: expected them to live, got one that the system killed (too little "
            "memory?); the same command goes on with fewer --processes"
        ) from None
    finally:
        shared.stop.set()
        executor.shutdown(cancel_futures=True)


def _write(work: Work, config: DataConfig, source: str, count: Callable[[int], object]) -> None:
    tokenizer = make_tokenizer(config.tokenizer, config.start_token)
    with contextlib.suppress(_StoppedError):
        write_shard(work.path, _documents(work, config, tokenizer, count), tokenizer, source)


class _StoppedError(Exception):
    """Another process failed, or the user has had enough."""


def _documents(
    work: Work, config: DataConfig, tokenizer: Tokenizer, count: Callable[[int], object]
) -> Iterator[tuple[NDArray[np.uint32], bytes]]:
    utf8 = not isinstance(tokenizer, ByteTokenizer)
    for piece in work.pieces:
        left = piece.size
        for texts in batched(read_documents(piece, config.field, utf8=utf8), _TOGETHER):
            yield from tokens_of(texts, tokenizer)
            read = min(left, sum(map(len, texts)))  # there is more in the file than the text
            left -= read
            count(read)
        count(left)


def _count(size: int) -> None:
    if _shared.stop.is_set():
        raise _StoppedError
    with _shared.read.get_lock():
        _shared.read.value += size
