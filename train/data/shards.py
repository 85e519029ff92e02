"""Files of tokens: a header with a digest, the tokens, a table of documents; read by mapping.

`magic [8], header [4088] (JSON, padded with spaces), tokens [N] (uint16 or uint32, padded to 8
bytes), documents [D, 3] uint64 (end in tokens, bytes behind its targets, digest)`, little-endian.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from train.data.corpus import digest_of, held_out_of
from train.data.documents import Documents
from train.data.files import SHARD_SUFFIX, reason_of
from train.errors import RunError
from train.tokenizer import Tokenizer

_MAGIC = b"MDNTOK01"
_HEADER = 4096
_BLOCK = 1 << 24
_NAME = re.compile(rf"(?P<index>\d+)-of-(?P<count>\d+)\{SHARD_SUFFIX}")


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
    sha256: str = ""

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
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
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
            size = len(text) - tokenizer.bytes_of_first(tokens)
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
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_HEADER)
    except OSError as error:
        raise RunError(
            f"data.files: expected readable shards, got {path}: {error.strerror}"
        ) from None
    if not start.startswith(_MAGIC):
        raise RunError(f"data.files: expected a shard of mdn-tokenize, got {path}, which is none")
    try:
        header = Header(**json.loads(start[len(_MAGIC) :]))
        expected = header.file_bytes
    except (ValueError, TypeError):
        raise RunError(
            f"data.files: expected an intact shard, got {path}: its header is damaged"
        ) from None
    if size != expected:
        raise RunError(
            f"data.files: expected an intact shard of {expected:,} bytes, got {path} of {size:,}; "
            "delete it and run mdn-tokenize again"
        )
    return header


def check_digest(path: Path, header: Header) -> None:
    """Reads a whole shard.

    Raises:
      RunError: not what was written.
    """
    digest = header.digest()
    try:
        with path.open("rb") as file:
            file.seek(_HEADER)
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise RunError(
            f"data.files: expected readable shards, got {path}: {error.strerror}"
        ) from None
    if digest.hexdigest() != header.sha256:
        raise RunError(
            f"data.files: expected a shard with the SHA-256 of its header ({header.sha256[:12]}), "
            f"got {path} with {digest.hexdigest()[:12]}; delete it and run mdn-tokenize again"
        )


def check_tokenizer(path: Path, header: Header, tokenizer: Tokenizer) -> None:
    """Raises unless a shard's tokens are those of a tokenizer.

    Raises:
      RunError: of another one.
    """
    if (header.tokenizer, header.vocab_size) != (tokenizer.fingerprint, tokenizer.vocab_size):
        raise RunError(
            f"data.tokenizer: expected that of {path} (fingerprint {header.tokenizer[:12]}, "
            f"{header.vocab_size:,} tokens), got {tokenizer.fingerprint[:12]} with "
            f"{tokenizer.vocab_size:,}"
        )


def open_shards(
    paths: Sequence[Path], tokenizer: Tokenizer, *, held_out_fraction: float, verify: bool
) -> tuple[Documents, Documents, str]:
    """Maps shards.

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
    _check_complete(paths)
    arrays, tables = [], []
    fingerprint = hashlib.sha256()
    for path in tqdm(paths, desc="shards", unit="shard", disable=None, leave=False):
        header = read_header(path)
        check_tokenizer(path, header, tokenizer)
        if verify:
            check_digest(path, header)
        fingerprint.update(bytes.fromhex(header.sha256))
        mapped = np.memmap(path, np.uint8, "r")
        kind = np.dtype(header.dtype).newbyteorder("<")
        arrays.append(mapped[_HEADER:][: header.tokens * kind.itemsize].view(kind))
        tables.append(mapped[_HEADER + header.tokens_bytes :].view("<u8").reshape(-1, 3))
    counts = [len(table) for table in tables]
    if not sum(counts):
        raise RunError(f"data.files: expected shards with documents, got {len(paths)} without any")
    length = np.concatenate([np.diff(table[:, 0], prepend=np.uint64(0)) for table in tables])
    end = np.concatenate([table[:, 0] for table in tables])
    digests = np.concatenate([table[:, 2] for table in tables])
    documents = Documents(
        arrays,
        np.repeat(np.arange(len(tables), dtype=np.int32), counts),
        (end - length).astype(np.int64),
        length.astype(np.int64),
        np.concatenate([table[:, 1] for table in tables]).astype(np.int64),
    )
    if len(documents) == 1:
        train, held_out = documents.cut(held_out_fraction)
    else:
        held = held_out_of(digests, held_out_fraction)
        train, held_out = documents[~held], documents[held]
    return train, held_out, fingerprint.hexdigest()


def _check_complete(paths: Sequence[Path]) -> None:
    for directory in {path.parent for path in paths}:
        names = [_NAME.fullmatch(path.name) for path in paths if path.parent == directory]
        counts = {int(name["count"]) for name in names if name}
        found = {int(name["index"]) for name in names if name}
        missing = set(range(max(counts, default=0))) - found
        if len(counts) > 1 or missing:
            raise RunError(
                f"data.files: expected all of the {max(counts)} shards of {directory}, got "
                f"{len(found)}; run mdn-tokenize again to make those that are missing"
            )
