"""Documents in files: plain text, JSONL and Parquet, whole or in pieces."""

import contextlib
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from mdn_jax.errors import RunError
from mdn_jax.extras import install
from mdn_jax.text.files import Format, is_compressed, reason_of, shown
from mdn_jax.text.records import Fields

# How files begin that are no text, whatever their names say; others have a zero byte somewhere.
_BEGINNINGS = {
    "compressed by gzip": rb"\x1f\x8b",
    "compressed by bzip2": rb"BZh[1-9]1AY&SY",
    "compressed by xz": rb"\xfd7zXZ",
    "compressed by Zstandard": rb"\x28\xb5\x2f\xfd",
    "a zip archive": rb"PK\x03\x04",
    "Parquet": rb"PAR1",
    "a shard of tokens": rb"MDNTOK",
    "UTF-16 or UTF-32": rb"\xff\xfe|\xfe\xff",
}

_BLOCK = 1 << 20
_ERRORS = (OSError, EOFError, ValueError, MemoryError, zlib.error)  # of the system and of gzip


class Piece(NamedTuple):
    """A part of a file that can be read by itself.

    Attributes:
      path: the file, by the name that says how it is compressed.
      format: what it is.
      start: first byte of JSONL, first row group of Parquet; 0 for text.
      stop: the first one after it; None: the end of the file.
      size: bytes of the file that it stands for.
    """

    path: Path
    format: Format
    start: int
    stop: int | None
    size: int


def cut_files(files: Sequence[tuple[Path, Format]], *, size: int) -> Iterator[Piece]:
    """Pieces of about `size` bytes, or smaller files, in the order of the files.

    Text, and what is compressed, is never cut.

    Raises:
      RunError: a file that cannot be read.
    """
    for path, format in files:
        with reading(path):
            total = path.stat().st_size
        if format == "jsonl" and not is_compressed(path) and total > size:
            for start in range(0, total, size):
                stop = min(start + size, total)
                yield Piece(path, format, start, stop, stop - start)
        elif format == "parquet" and total > size:
            with _open_parquet(path) as file:
                groups = file.num_row_groups
            each = max(1, groups * size // total)
            for start in range(0, groups, each):
                stop = min(start + each, groups)
                yield Piece(path, format, start, stop, total * (stop - start) // groups)
        else:
            yield Piece(path, format, 0, None, total)


def read_documents(
    piece: Piece, field: str | Fields, *, utf8: bool = False, empty: Counter[Path] | None = None
) -> Iterator[bytes]:
    """The documents of a piece that are not empty.

    Args:
      piece: what to read.
      field: of JSONL or Parquet that holds the text, or several that are a document.
      utf8: refuse text that is not UTF-8, which JSONL always is.
      empty: counts the records without text by their files; files of plain text do not count.

    Raises:
      RunError: a file that cannot be read or is no text, a record that does not fit, by its line
        or row.
    """
    readers: dict[Format, Callable[[Piece, Fields], Iterator[tuple[bytes, str]]]] = {
        "text": _read_text,
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
    }
    fields = Fields(field) if isinstance(field, str) else field
    if fields.are_parts and piece.format == "text":
        raise RunError(
            f"data.files: expected JSONL or Parquet with data.prompt or data.messages, got text "
            f"({shown(piece.path)})"
        )
    for text, place in readers[piece.format](piece, fields):
        if utf8:
            try:
                text.decode()
            except UnicodeDecodeError as error:
                raise RunError(
                    f"data.tokenizer: expected UTF-8 text for a tokenizer other than bytes, got "
                    f"{shown(piece.path)}{place}: {error.reason} at byte {error.start}"
                ) from None
        if text:
            yield text
        elif empty is not None and piece.format != "text":
            empty[piece.path] += 1


def _read_text(piece: Piece, fields: Fields) -> Iterator[tuple[bytes, str]]:
    with reading(piece.path), _open(piece.path) as file:
        text = file.read()
    zero = text.find(0)
    kinds = [kind for kind, begin in _BEGINNINGS.items() if re.match(begin, text)]
    if kinds or zero >= 0:
        raise RunError(
            f"data.files: expected text, got {shown(piece.path)}, which is "
            f"{kinds[0] if kinds else f'binary (a zero at byte {zero})'}; the suffix of a file's "
            "name, or data.format, says what it is"
        )
    yield text, ""


def _read_jsonl(piece: Piece, fields: Fields) -> Iterator[tuple[bytes, str]]:
    with reading(piece.path), _open(piece.path) as file:
        position = piece.start
        if position:  # a line belongs to the piece that it starts in
            file.seek(position - 1)
            limit = -1 if piece.stop is None else piece.stop - position + 1
            position += len(file.readline(limit)) - 1
        while (piece.stop is None or position < piece.stop) and (line := file.readline()):
            if line.strip():
                try:
                    yield _text_of_line(line, fields), ""
                except ValueError as error:
                    number = _line_number(piece.path, position)
                    raise RunError(f"{shown(piece.path)}:{number}: {error}") from None
            position += len(line)


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path) if is_compressed(path) else path.open("rb")


def _text_of_line(line: bytes, fields: Fields) -> bytes:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a line of JSON, got {line[:40]!r}: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    for name in fields.names:
        if name not in record:
            raise ValueError(f"data.field: expected one of {_some(sorted(record))}, got {name!r}")
    return fields.document(record)


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"{names[:20]}{rest}"


def _line_number(path: Path, position: int) -> int:
    with _open(path) as file:
        lines = 1
        while position > 0 and (block := file.read(min(position, _BLOCK))):
            lines += block.count(b"\n")
            position -= len(block)
    return lines


def _read_parquet(piece: Piece, fields: Fields) -> Iterator[tuple[bytes, str]]:
    name = shown(piece.path)
    with _open_parquet(piece.path) as file:
        names = file.schema_arrow.names
        for field in fields.names:
            if field not in names:
                raise RunError(
                    f"data.field: expected one of {_some(names)} (columns of {name}), got {field!r}"
                )
            if names.count(field) > 1:
                raise RunError(f"data.field: expected one {field!r} in {name}, got a column twice")
            kind = str(file.schema_arrow.field(field).type)
            if fields.messages is None and kind not in _TEXTS[: 3 if fields.are_parts else None]:
                raise RunError(f"data.field: expected text in {field!r} of {name}, got {kind}")
        stop = file.num_row_groups if piece.stop is None else piece.stop
        row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
        groups = list(range(piece.start, stop))
        for batch in file.iter_batches(1024, row_groups=groups, columns=list(fields.names)):
            for record in batch.to_pylist():
                yield _text_of_row(record, fields, f"{name}: ", row), f" in row {row}"
                row += 1


_TEXTS = ("string", "large_string", "string_view", "binary", "large_binary")  # types of columns


def _text_of_row(record: dict[str, Any], fields: Fields, name: str, row: int) -> bytes:
    if None in record.values():
        raise RunError(f"{name}expected text in row {row}, got null")
    value = record[fields.text] if not fields.are_parts else None
    if isinstance(value, bytes):
        return value
    try:
        return fields.document(record)
    except ValueError as error:
        raise RunError(f"{name}row {row}: {error}") from None


@contextlib.contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise RunError(f"data.files: Parquet needs pyarrow: {install('huggingface')}") from None
    with reading(path, (Exception,)), pyarrow.parquet.ParquetFile(path) as file:
        yield file


@contextlib.contextmanager
def reading(path: Path, errors: tuple[type[Exception], ...] = _ERRORS) -> Iterator[None]:
    """Within it, these errors are a file that cannot be read.

    Raises:
      RunError: by the name of the file.
    """
    try:
        yield
    except RunError:
        raise
    except errors as error:
        raise RunError(
            f"data.files: expected readable files, got {shown(path)}: {reason_of(error)}"
        ) from None
