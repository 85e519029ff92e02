"""Which files of text somebody names, and what the name of each says it is."""

import functools
import glob
import os
import stat
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Literal, Protocol

from mdn_jax.errors import RunError

Format = Literal["text", "jsonl", "parquet", "tokens"]


class TextSource(Protocol):
    """Files of text and how they are read: `TextFiles`, or a configuration with these fields.

    Attributes:
      files: names, globs or directories; none: the standard library's source text.
      format: what the files are; None: their suffix says so.
      field: of JSONL, or column of Parquet, that holds the text; with `prompt` the completion.
      prompt: field of the text before a completion; None: there is none.
      messages: field of chats; None: the records are none.
      split: of a directory of Parquet files.
      held_out_fraction: share of the documents that is held out.
    """

    @property
    def files(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def format(self) -> Format | None: ...  # noqa: D102
    @property
    def field(self) -> str: ...  # noqa: D102
    @property
    def prompt(self) -> str | None: ...  # noqa: D102
    @property
    def messages(self) -> str | None: ...  # noqa: D102
    @property
    def split(self) -> str: ...  # noqa: D102
    @property
    def held_out_fraction(self) -> float: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Files of text and how they are read; fields as of `TextSource`."""

    files: tuple[str, ...] = ()
    format: Format | None = None
    field: str = "text"
    prompt: str | None = None
    messages: str | None = None
    split: str = "train"
    held_out_fraction: float = 0.05


SHARD_SUFFIX = ".tokens"
COMPRESSED_SUFFIX = ".gz"
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    SHARD_SUFFIX: "tokens",
}
_KINDS: dict[Callable[[int], bool], str] = {
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}

# Installed packages, tests, and modules that are tables rather than code.
_NOT_READ = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)


def find_files(source: TextSource) -> list[tuple[Path, Format]]:
    """The files that a source names, sorted, with what they are.

    Format and compression come from the name that was given and never from what a link leads to.
    A file with several names is one, by the first of them. Hidden files are left out unless they
    are named themselves.

    Raises:
      RunError: a name that matches nothing, leads nowhere or to something else than a file, or
        shards among other files.
    """
    if not source.files:
        return [(path, source.format or "text") for path in standard_library_files()]
    real = functools.cache(os.path.realpath)  # of directories, which have many files
    found: dict[str, Path] = {}  # the first name of each file
    for pattern in source.files:
        for name in _files_of(pattern, source.split):
            # links on the way to a file are nothing to its name
            path = Path(real(os.path.dirname(name)), os.path.basename(name))
            found.setdefault(os.path.realpath(path) if path.is_symlink() else str(path), path)
    files = [(path, source.format or _format_of(path)) for path in sorted(found.values())]
    formats = {format for _, format in files}
    if "tokens" in formats and len(formats) > 1:
        raise RunError(
            f"data.files: expected shards of tokens alone, got {sorted(formats)} together"
        )
    return files


def refuse_shards(files: Sequence[tuple[Path, Format]]) -> None:
    """Raises where there has to be text.

    Raises:
      RunError: files of `find_files` that are shards.
    """
    if files[0][1] == "tokens":
        raise RunError("data.files: expected text, JSONL or Parquet, got shards")


def is_compressed(path: Path) -> bool:
    """Whether a file's name says that it is compressed by gzip."""
    return path.suffix.lower() == COMPRESSED_SUFFIX


def _format_of(path: Path) -> Format:
    name = path.with_suffix("") if is_compressed(path) else path
    return _SUFFIXES.get(name.suffix.lower(), "text")


def _files_of(pattern: str, split: str) -> list[str]:
    """The files that a path, a glob (`**` crosses directories) or a directory names."""
    name = os.path.expanduser(pattern)
    directory = os.path.isdir(name)
    if directory and (inside := _files_of_directory(name, split)):
        return inside
    names = [name] if os.path.lexists(name) else _matching(name)
    files = list(filter(_is_file, sorted(names)))
    if not files:
        hint = " (a directory without files that are not hidden)" if directory else ""
        raise RunError(
            f"data.files: expected a file or a glob that matches files, "
            f"got {pattern!r}, which matches none{hint}"
        )
    return files


def _files_of_directory(directory: str, split: str) -> list[str]:
    """Shards, or the Parquet files of a split: <split>-*.parquet, or within <split>/.

    Where there are neither, all files within it, at any depth.
    """
    shards = list(filter(_is_file, sorted(_inside(directory, f"*{SHARD_SUFFIX}"))))
    parquet = list(filter(_is_file, sorted(_inside(directory, "**", "*.parquet"))))
    if shards:
        return shards
    if not parquet:
        return list(filter(_is_file, sorted(_inside(directory, "**", "*"))))
    names = {path: Path(path).relative_to(directory) for path in parquet}
    found = [
        path
        for path, name in names.items()
        if name.stem.split("-")[0] == split or split in name.parts[:-1]
    ]
    if not found:
        raise RunError(
            f"data.split: expected a split in {shown(directory)}, got {split!r}; the files there "
            f"are {', '.join(map(shown, list(names.values())[:5]))}"
        )
    return found


def _matching(pattern: str) -> Iterator[str]:
    """Names that a glob matches; `**` goes by links too, into each directory once."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    first = parts.index("**")
    behind = list(dropwhile(lambda part: part == "**", parts[first:])) or ["*"]
    for top in sorted(glob.glob(os.path.join(*parts[:first]) if first else ".")):
        for directory in _directories(top):
            yield from _inside(directory, *behind)


def _inside(directory: str, *parts: str) -> Iterator[str]:
    return _matching(os.path.join(glob.escape(directory), *parts))


def _directories(top: str) -> Iterator[str]:
    """A directory and those in it, at any depth, that are not hidden; each once."""
    seen = set()
    waiting = [top] if os.path.isdir(top) else []
    while waiting:
        directory = waiting.pop()
        if (real := os.path.realpath(directory)) in seen:  # a second link, or one that leads back
            continue
        seen.add(real)
        yield directory
        try:
            with os.scandir(directory) as entries:
                inside = [
                    entry.path
                    for entry in entries
                    if not entry.name.startswith(".")
                    and (os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir())
                ]
        except OSError as error:
            raise RunError(_unreadable(directory, error)) from None
        waiting += sorted(inside, reverse=True)


def _is_file(name: str) -> bool:
    """Whether a name leads to a file; False: to a directory.

    Raises:
      RunError: nowhere, or to what could be waited for without an end.
    """
    try:
        mode = os.stat(name).st_mode
    except OSError as error:
        raise RunError(_unreadable(name, error)) from None
    for is_kind, kind in _KINDS.items():
        if is_kind(mode):
            raise RunError(f"data.files: expected files, got {shown(name)}, which is {kind}")
    return not stat.S_ISDIR(mode)


def _unreadable(name: str, error: OSError) -> str:
    link = f" (a link to {shown(os.readlink(name))})" if os.path.islink(name) else ""
    return f"data.files: expected readable files, got {shown(name)}{link}: {reason_of(error)}"


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


def shown(path: str | Path) -> str:
    """A path for a message of one line: quoted where it has line ends or is no text."""
    name = str(path)
    return name if name.isprintable() else ascii(name)


def reason_of(error: BaseException) -> str:
    """What the operating system says, or else a library, in one line."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(reason.split()) or type(error).__name__
