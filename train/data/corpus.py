"""Documents: the user's files, or the source text of Python's own standard library."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from train.config import DataConfig
from train.errors import RunError

# Installed packages, tests, and modules that are tables rather than code.
_NOT_READ = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)


class Corpus(NamedTuple):
    """Documents of a run, as bytes, each in one of the two sets.

    Attributes:
      train: documents to train on.
      held_out: documents to measure the loss on.
      fingerprint: digest of both sets; equal only for equal documents with the same split.
    """

    train: list[bytes]
    held_out: list[bytes]
    fingerprint: str


def load_corpus(config: DataConfig) -> Corpus:
    """Reads the documents and splits them into train and held-out.

    A document is one file. Its own content decides its set (the first 8 bytes of its SHA-256, as a
    fraction of their range, against `held_out_fraction`), so the split does not depend on where the
    files lie, on their order or on the other files, and copies of a file are one document. Neither
    set is ever empty; a single document is cut, its end held out.

    Args:
      config: which files, and the fraction to hold out.

    Returns:
      The two sets.

    Raises:
      RunError: a name that matches no file, or files without any text.
    """
    paths = matching_files(config.files) if config.files else standard_library_files()
    documents = {}
    for path in paths:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise RunError(
                f"data.files: expected readable files, got {path}: {error.strerror}"
            ) from None
        if text:
            documents[hashlib.sha256(text).digest()] = text
    if not documents:
        source = ", ".join(map(repr, config.files)) or "the standard library's *.py files"
        raise RunError(
            f"data.files: expected files with text in them, got {len(paths)} file(s), "
            f"all of them empty ({source})"
        )
    train, held_out = _split(documents, config.held_out_fraction)
    return Corpus(train, held_out, _fingerprint(train, held_out))


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


def _split(documents: dict[bytes, bytes], fraction: float) -> tuple[list[bytes], list[bytes]]:
    """Divides documents, keyed by digest and in their order, into train and held-out."""
    if len(documents) == 1:
        (text,) = documents.values()
        cut = len(text) - max(1, round(len(text) * fraction))
        return [text[:cut]], [text[cut:]]
    place = {digest: int.from_bytes(digest[:8]) / 2**64 for digest in documents}
    ranked = sorted(documents, key=lambda digest: (place[digest], digest))
    count = sum(place[digest] < fraction for digest in documents)
    held = set(ranked[: min(max(count, 1), len(documents) - 1)])
    return (
        [text for digest, text in documents.items() if digest not in held],
        [text for digest, text in documents.items() if digest in held],
    )


def _fingerprint(train: list[bytes], held_out: list[bytes]) -> str:
    digest = hashlib.sha256()
    for documents in (train, held_out):
        digest.update(len(documents).to_bytes(8))
        for text in documents:
            digest.update(len(text).to_bytes(8))
            digest.update(text)
    return digest.hexdigest()
