"""Files of tokens: a header with a digest, the tokens, a table of documents; read by mapping.

`magic [8], header [4088] (JSON, padded with spaces), tokens [N] (uint16 or uint32, padded to 8
bytes), documents [D, 3] uint64 (end in tokens, bytes behind its targets, digest)`, little-endian.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mdn_jax.errors import RunError
from mdn_jax.text.corpus import digest_of, held_out_of
from mdn_jax.text.files import SHARD_SUFFIX, reason_of, shown
from mdn_jax.text.tokenizer import Tokenizer
from train.data.documents import Documents, bytes_of_targets

_MAGIC = b"MDNTOK01"
_HEADER = 4096
_DTYPES = ("uint16", "uint32")
_AGAIN = "delete it and run `python -m train tokenize` again"
_BLOCK = 1 << 24
_NAME = re.compile(rf"(?P<index>\d+)-of-(?P<count>\d+)\{SHARD_SUFFIX}")
_UNFINISHED = re.compile(r"\d+-of-\d+\.\d+\.tmp")
_LARGEST = 1 << 48  # of any number in a shard: beyond every disk


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a shard says about itself.

    Attributes:
      tokenizer: fingerprint.
      vocab_size: ids are below it.
      dtype: of the tokens.
      tokens: their number.
      documents: their number.
      source: digest of what was to be tokenised, the same for all shards of a directory.
      sha256: of the header without it, the tokens and the table.
    """

    tokenizer: str
    vocab_size: int
    dtype: str
    tokens: int
    documents: int
    source: str
    sha256: str = "0" * 64

    def __post_init__(self) -> None:
        """Raises ValueError for what no writer writes."""
        for name, smallest in (("vocab_size", 1), ("tokens", 0), ("documents", 0)):
            value = getattr(self, name)
            if type(value) is not int or not smallest <= value < _LARGEST:
                raise ValueError(f"{name}: expected an int >= {smallest}, got {value!r:.40}")
        for name in ("tokenizer", "source", "sha256"):
            if not isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name}: expected a string, got {value!r:.40}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {_DTYPES}, got {self.dtype!r:.40}")
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256: expected 64 digits, got {self.sha256!r:.40}")

    @property
    def tokens_bytes(self) -> int:
        """Bytes of the tokens, padding included."""
        return -(-self.tokens * np.dtype(self.dtype).itemsize // 8) * 8

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return _HEADER + self.tokens_bytes + self.documents * 24

    def digest(self) -> "hashlib._Hash":
        """The digest's beginning: that of the header."""
        values = asdict(self) | {"sha256": ""}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode())


def shard_name(index: int, count: int) -> str:
    """The file name of one of a directory's shards."""
    return f"{index:05d}-of-{count:05d}{SHARD_SUFFIX}"


def write_shard(
    path: Path,
    documents: Iterable[tuple[NDArray[np.uint32], bytes]],
    tokenizer: Tokenizer,
    source: str,
) -> Header:
    """Writes a shard whole or not at all.

    Args:
      path: of the file.
      documents: tokens and text of each.
      tokenizer: of the tokens.
      source: digest of what was to be tokenised.

    Raises:
      RunError: no room, or nowhere to write to.
    """
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # see `unfinished_shards`
    try:
        header = _write(temporary, documents, tokenizer, source)
        temporary.replace(path)
    except OSError as error:
        raise RunError(
            f"output: expected to write {path}, got: {reason_of(error)}; the shards before it are "
            "as they were, and the same command goes on"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return header


def unfinished_shards(directory: Path) -> list[Path]:
    """What calls of `write_shard` that were killed left in a directory."""
    return [path for path in directory.glob("*.tmp") if _UNFINISHED.fullmatch(path.name)]


def _write(
    path: Path,
    documents: Iterable[tuple[NDArray[np.uint32], bytes]],
    tokenizer: Tokenizer,
    source: str,
) -> Header:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    total, table = 0, []
    with path.open("wb+") as file:
        file.seek(_HEADER)
        for tokens, text in documents:
            file.write(tokens.astype(dtype.newbyteorder("<")).tobytes())
            total += len(tokens)
            size = bytes_of_targets(tokens, text, tokenizer)
            table.append((total, size, int.from_bytes(digest_of(text)[:8])))
        header = Header(
            tokenizer=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            dtype=dtype.name,
            tokens=total,
            documents=len(table),
            source=source,
        )
        file.write(bytes(header.tokens_bytes - total * dtype.itemsize))
        file.write(np.array(table, "<u8").tobytes())
        file.seek(_HEADER)
        digest = header.digest()
        while block := file.read(_BLOCK):
            digest.update(block)
        header = Header(**asdict(header) | {"sha256": digest.hexdigest()})
        file.seek(0)
        file.write(_MAGIC + json.dumps(asdict(header)).encode().ljust(_HEADER - len(_MAGIC)))
        file.flush()
        os.fsync(file.fileno())
    return header


def read_header(path: Path) -> Header:
    """The header of a shard whose file has the size that it says.

    Raises:
      RunError: a file that cannot be read, is no shard, or is cut off.
    """
    with _reading(path):
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_HEADER)
    if not start.startswith(_MAGIC):
        raise RunError(f"data.files: expected a shard of tokens, got {shown(path)}, which is none")
    try:
        header = Header(**json.loads(start[len(_MAGIC) :]))
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(path, f"its header is damaged: {reason_of(error)}") from None
    if size != header.file_bytes:
        raise RunError(
            f"data.files: expected an intact shard of {header.file_bytes:,} bytes, got "
            f"{shown(path)} of {size:,}; {_AGAIN}"
        )
    return header


def check_contents(path: Path, header: Header) -> None:
    """Reads a whole shard.

    Raises:
      RunError: not what was written, or tokens that are not below the size of the vocabulary.
    """
    digest, largest = header.digest(), -1
    kind, left = _little(header), header.tokens
    with _reading(path), path.open("rb") as file:
        file.seek(_HEADER)
        while block := file.read(_BLOCK):
            digest.update(block)
            tokens = np.frombuffer(block, kind, min(left, len(block) // kind.itemsize))
            largest = max(largest, int(tokens.max(initial=0)))
            left -= len(tokens)
    if digest.hexdigest() != header.sha256:
        raise RunError(
            f"data.files: expected a shard with the SHA-256 of its header ({header.sha256[:12]}), "
            f"got {shown(path)} with {digest.hexdigest()[:12]}; {_AGAIN}"
        )
    if largest >= header.vocab_size:
        raise RunError(
            f"data.files: expected tokens below the {header.vocab_size:,} of the vocabulary, got "
            f"{largest:,} in {shown(path)}"
        )


def _little(header: Header) -> np.dtype[np.unsignedinteger]:
    return np.dtype(header.dtype).newbyteorder("<")


def _damaged(path: Path, what: str) -> RunError:
    return RunError(f"data.files: expected an intact shard, got {shown(path)}: {what}; {_AGAIN}")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"data.files: expected readable shards, got {shown(path)}: {reason_of(error)}"
        ) from None


def check_tokenizer(path: Path, header: Header, tokenizer: Tokenizer) -> None:
    """Raises unless a shard's tokens are those of a tokenizer.

    Raises:
      RunError: of another one.
    """
    if (header.tokenizer, header.vocab_size) != (tokenizer.fingerprint, tokenizer.vocab_size):
        raise RunError(
            f"data.tokenizer: expected that of {shown(path)} (fingerprint {header.tokenizer[:12]}, "
            f"{header.vocab_size:,} tokens), got {tokenizer.fingerprint[:12]} with "
            f"{tokenizer.vocab_size:,}"
        )


class Mapped(NamedTuple):
    """Shards that are mapped.

    Attributes:
      documents: of all of them, in their order.
      digests: the first 8 bytes of the SHA-256 of each document's text.
      fingerprint: digest of all shards.
    """

    documents: Documents
    digests: NDArray[np.uint64]
    fingerprint: str


def open_shards(
    paths: Sequence[Path], tokenizer: Tokenizer, *, held_out_fraction: float, verify: bool
) -> tuple[Documents, Documents, str]:
    """Maps shards and divides their documents.

    Args:
      paths: of the files, all the shards of each directory that they are from.
      tokenizer: that they have to be of.
      held_out_fraction: share of the documents that is held out, as in `load_corpus`.
      verify: check the digests.

    Returns:
      The documents to train on, those held out, and the digest of all of them.

    Raises:
      RunError: shards that are missing, damaged, or of another tokenizer.
    """
    documents, digests, fingerprint = map_shards(paths, tokenizer, verify=verify)
    if len(documents) == 1:
        train, held_out = documents.cut(held_out_fraction)
    else:
        held = held_out_of(digests, held_out_fraction)
        train, held_out = documents[~held], documents[held]
    return train, held_out, fingerprint


def map_shards(paths: Sequence[Path], tokenizer: Tokenizer, *, verify: bool) -> Mapped:
    """Maps shards; arguments and errors as of `open_shards`."""
    _check_complete(paths)
    arrays, tables = [], []
    fingerprint = hashlib.sha256()
    for path in tqdm(paths, desc="shards", unit="shard", disable=None, leave=False):
        header = read_header(path)
        check_tokenizer(path, header, tokenizer)
        if verify:
            check_contents(path, header)
        fingerprint.update(bytes.fromhex(header.sha256))
        with _reading(path):
            mapped = np.memmap(path, np.uint8, "r")
        kind = _little(header)
        arrays.append(mapped[_HEADER:][: header.tokens * kind.itemsize].view(kind))
        tables.append(mapped[_HEADER + header.tokens_bytes :].view("<u8").reshape(-1, 3))
        _check_table(path, header, tables[-1])
    counts = [len(table) for table in tables]
    if not sum(counts):
        raise RunError(f"data.files: expected shards with documents, got {len(paths)} without any")
    length = np.concatenate([np.diff(table[:, 0], prepend=np.uint64(0)) for table in tables])
    end = np.concatenate([table[:, 0] for table in tables])
    documents = Documents(
        arrays,
        np.repeat(np.arange(len(tables), dtype=np.int32), counts),
        (end - length).astype(np.int64),
        length.astype(np.int64),
        np.concatenate([table[:, 1] for table in tables]).astype(np.int64),
    )
    digests = np.concatenate([table[:, 2] for table in tables])
    return Mapped(documents, digests, fingerprint.hexdigest())


def _check_table(path: Path, header: Header, table: NDArray[np.uint64]) -> None:
    """Raises unless the documents lie one behind the other and are all of the tokens."""
    ends, sizes = table[:, 0], table[:, 1]
    before = np.append(np.uint64(0), ends)
    wrong = np.flatnonzero(
        (ends <= before[:-1]) | (ends > header.tokens) | (sizes >= np.uint64(_LARGEST))
    )
    if len(wrong) or before[-1] != header.tokens:
        i = int(wrong[0]) if len(wrong) else len(ends)
        what = (
            f"document {i} from token {before[i]:,} to {ends[i]:,} with {sizes[i]:,} bytes"
            if len(wrong)
            else f"an end at token {before[-1]:,}"
        )
        raise _damaged(path, f"its table of {header.tokens:,} tokens has {what}")


def _check_complete(paths: Sequence[Path]) -> None:
    for directory in {path.parent for path in paths}:
        names = [_NAME.fullmatch(path.name) for path in paths if path.parent == directory]
        counts = {int(name["count"]) for name in names if name}
        found = {int(name["index"]) for name in names if name}
        count = max(counts, default=0)
        if len(counts) > 1 or len(found) != count or max(found, default=-1) >= count:
            raise RunError(
                f"data.files: expected all of the {count} shards of {shown(directory)}, got "
                f"{len(found)}; run `python -m train tokenize` again to make those that are missing"
            )
