"""Documents in files: plain text, JSONL and Parquet, whole or in pieces."""

import contextlib
import glob
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from train.errors import RunError
from train.sections import DataConfig

Format = Literal["text", "jsonl", "parquet", "tokens"]

SHARD_SUFFIX = ".tokens"
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    SHARD_SUFFIX: "tokens",
}

# Installed packages, tests, and modules that are tables rather than code.
_NOT_READ = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)


class Piece(NamedTuple):
    """A part of a file that can be read by itself.

    Attributes:
      path: the file.
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


def find_files(config: DataConfig) -> list[tuple[Path, Format]]:
    """The files that a configuration names, sorted, with what they are.

    Raises:
      RunError: a name that matches nothing, or shards among other files.
    """
    if not config.files:
        return [(path, config.format or "text") for path in standard_library_files()]
    paths: set[Path] = set()
    for pattern in config.files:
        directory = Path(pattern).expanduser()
        inside = _files_of_directory(directory, config.split) if directory.is_dir() else []
        paths |= {path.resolve() for path in inside} or set(matching_files([pattern]))
    found = [(path, config.format or _format_of(path)) for path in sorted(paths)]
    formats = {format for _, format in found}
    if "tokens" in formats and len(formats) > 1:
        raise RunError(
            f"data.files: expected shards of mdn-tokenize alone, got {sorted(formats)} together"
        )
    return found


def _format_of(path: Path) -> Format:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return _SUFFIXES.get(suffixes[-1] if suffixes else "", "text")


def _files_of_directory(directory: Path, split: str) -> list[Path]:
    """Shards, or the Parquet files of a split: <split>-*.parquet, or within <split>/."""
    shards = sorted(directory.glob(f"*{SHARD_SUFFIX}"))
    parquet = sorted(directory.rglob("*.parquet"))
    if shards or not parquet:
        return shards
    names = {path: path.relative_to(directory) for path in parquet}
    found = [
        path
        for path, name in names.items()
        if name.stem.split("-")[0] == split or split in name.parts[:-1]
    ]
    if not found:
        raise RunError(
            f"data.split: expected a split in {directory}, got {split!r}; the files there are "
            f"{', '.join(map(str, list(names.values())[:5]))}"
        )
    return found


def standard_library_files() -> list[Path]:
    """The standard library's Python files, found through `sysconfig`, sorted by relative path.

    Installed packages, the library's own tests and its tables (`encodings`, `pydoc_data`) are left
    out: some 10 MB of code and prose remain.

    Raises:
      RunError: the standard library is not on the disk as source text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    relative = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    files = [root / path for path in relative if not _NOT_READ.intersection(path.parts[:-1])]
    if not files:
        raise RunError(
            f"data.files: expected the standard library's source text in {root}, found no *.py "
            "file there; name your own files with --data.files"
        )
    return files


def matching_files(patterns: Iterable[str]) -> list[Path]:
    """The files that paths or globs (`**` crosses directories) name, sorted, each once.

    Raises:
      RunError: a pattern that matches no file.
    """
    found: set[Path] = set()
    for pattern in patterns:
        names = glob.glob(os.path.expanduser(pattern), recursive=True, include_hidden=False)
        files = {path.resolve() for path in map(Path, names) if path.is_file()}
        if not files:
            hint = f" (a directory: try '{pattern}/**/*')" if Path(pattern).is_dir() else ""
            raise RunError(
                f"data.files: expected a file or a glob that matches files, "
                f"got {pattern!r}, which matches none{hint}"
            )
        found |= files
    return sorted(found)


def cut_files(files: Sequence[tuple[Path, Format]], *, size: int) -> Iterator[Piece]:
    """Pieces of about `size` bytes, or smaller files, in the order of the files.

    Text, and what is compressed, is never cut.

    Raises:
      RunError: a file that cannot be read.
    """
    for path, format in files:
        with _reading(path):
            total = path.stat().st_size
        if format == "jsonl" and path.suffix != ".gz" and total > size:
            for start in range(0, total, size):
                stop = min(start + size, total)
                yield Piece(path, format, start, stop, stop - start)
        elif format == "parquet" and total > size:
            with _reading(path):
                groups = _parquet().ParquetFile(path).num_row_groups
            each = max(1, groups * size // total)
            for start in range(0, groups, each):
                stop = min(start + each, groups)
                yield Piece(path, format, start, stop, total * (stop - start) // groups)
        else:
            yield Piece(path, format, 0, None, total)


def read_documents(piece: Piece, field: str, *, utf8: bool = False) -> Iterator[bytes]:
    """The documents of a piece that are not empty.

    Args:
      piece: what to read.
      field: of JSONL or Parquet that holds the text.
      utf8: refuse plain text that is not UTF-8.

    Raises:
      RunError: a file that cannot be read, a record that does not fit, by its line or row.
    """
    readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
    for text in readers[piece.format](piece, field):
        if utf8 and piece.format == "text":
            try:
                text.decode()
            except UnicodeDecodeError as error:
                raise RunError(
                    f"data.tokenizer: expected UTF-8 text for a tokenizer other than bytes, got "
                    f"{piece.path}: {error.reason} at byte {error.start}"
                ) from None
        if text:
            yield text


def _read_text(piece: Piece, field: str) -> Iterator[bytes]:
    with _reading(piece.path), _open(piece.path) as file:
        yield file.read()


def _read_jsonl(piece: Piece, field: str) -> Iterator[bytes]:
    with _reading(piece.path), _open(piece.path) as file:
        position = piece.start
        if position:  # a line belongs to the piece that it starts in
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while (piece.stop is None or position < piece.stop) and (line := file.readline()):
            if line.strip():
                try:
                    yield _text_of_line(line, field)
                except ValueError as error:
                    number = _line_number(piece.path, position)
                    raise RunError(f"{piece.path}:{number}: {error}") from None
            position += len(line)


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _text_of_line(line: bytes, field: str) -> bytes:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"expected a line of JSON, got {line[:40]!r}: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    if field not in record:
        raise ValueError(f"data.field: expected one of {sorted(record)}, got {field!r}")
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"{field}: expected a string, got {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{field}: expected text, got half of a surrogate pair: {error}") from None


def _line_number(path: Path, position: int) -> int:
    with _open(path) as file:
        lines = 1
        while position > 0 and (block := file.read(min(position, 1 << 20))):
            lines += block.count(b"\n")
            position -= len(block)
    return lines


def _read_parquet(piece: Piece, field: str) -> Iterator[bytes]:
    arrow = _parquet()
    with _reading(piece.path), arrow.ParquetFile(piece.path) as file:
        names = file.schema_arrow.names
        if field not in names:
            raise RunError(
                f"data.field: expected one of {names} (columns of {piece.path}), got {field!r}"
            )
        kind = str(file.schema_arrow.field(field).type)
        if kind not in ("string", "large_string", "string_view", "binary", "large_binary"):
            raise RunError(f"data.field: expected text in {field!r} of {piece.path}, got {kind}")
        stop = file.num_row_groups if piece.stop is None else piece.stop
        row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
        groups = list(range(piece.start, stop))
        for batch in file.iter_batches(1024, row_groups=groups, columns=[field]):
            for value in batch.column(0).to_pylist():
                if value is None:
                    raise RunError(f"{piece.path}: expected text in row {row}, got null")
                yield value if isinstance(value, bytes) else value.encode()
                row += 1


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise RunError(
            "data.files: Parquet needs pyarrow: pip install 'mdn-jax[huggingface]'"
        ) from None
    return pyarrow.parquet


def reason_of(error: Exception) -> str:
    """What the operating system says, or else a library, in one line."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(reason.split())


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error) as error:  # of gzip and pyarrow too
        raise RunError(
            f"data.files: expected readable files, got {path}: {reason_of(error)}"
        ) from None
