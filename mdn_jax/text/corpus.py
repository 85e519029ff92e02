"""Documents in memory, and which of them are held out."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mdn_jax.errors import RunError
from mdn_jax.text.files import Format, TextSource, find_files, refuse_shards
from mdn_jax.text.reading import cut_files, read_documents
from mdn_jax.text.records import Fields


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


def load_corpus(
    source: TextSource,
    *,
    files: Sequence[tuple[Path, Format]] | None = None,
    utf8: bool = False,
    empty: Counter[Path] | None = None,
) -> Corpus:
    """Reads the documents and splits them into train and held-out.

    A document is a file of text, a line of JSONL or a row of Parquet. Its own content decides its
    set (`place` against `held_out_fraction`), so the split does not depend on where the files lie,
    on their order or on the other files, and copies of a document are one. Neither set is ever
    empty; a single document is cut, its end held out.

    Args:
      source: which files, and the fraction to hold out.
      files: those of the source, from `find_files`; None: to be found here.
      utf8: refuse plain text that is not UTF-8.
      empty: counts the records without text, which are left out, by their files.

    Returns:
      The two sets.

    Raises:
      RunError: files that cannot be read, a record that does not fit, or no text at all.
    """
    texts = read_texts(source, files=files, utf8=utf8, empty=empty)
    documents = {digest_of(text): text for text in texts}
    if len(documents) == 1 and (source.prompt is not None or source.messages is not None):
        raise RunError(
            "data.files: expected two different records or more, of which one is held out, got one"
        )
    train, held_out = _split(documents, source.held_out_fraction)
    return Corpus(train, held_out, _fingerprint(train, held_out))


def read_texts(
    source: TextSource,
    *,
    files: Sequence[tuple[Path, Format]] | None = None,
    utf8: bool = False,
    empty: Counter[Path] | None = None,
) -> Iterator[bytes]:
    """The documents of files of text, JSONL and Parquet that are not empty, with every copy.

    Args:
      source: which files.
      files: those of the source, from `find_files`; None: to be found here.
      utf8: refuse text that is not UTF-8.
      empty: counts the records without text, which are left out, by their files.

    Raises:
      RunError: files that cannot be read, a record that does not fit, or no text at all.
    """
    if files is None:
        files = find_files(source)
    refuse_shards(files)
    none = True
    fields = Fields(source.field, source.prompt, source.messages)
    for piece in cut_files(files, size=1 << 62):
        for text in read_documents(piece, fields, utf8=utf8, empty=empty):
            none = False
            yield text
    if none:
        several = ", ..." if len(source.files) > 5 else ""
        named = ", ".join(map(repr, source.files[:5])) or "the standard library's *.py files"
        raise RunError(
            f"data.files: expected files with text in them, got {len(files)} file(s), "
            f"all of them empty ({named}{several})"
        )


def digest_of(text: bytes) -> bytes:
    """What decides a document's side: its SHA-256."""
    return hashlib.sha256(text).digest()


def place(digest: bytes) -> float:
    """The first 8 bytes of a digest as a fraction of their range."""
    return int.from_bytes(digest[:8]) / 2**64


def _split(documents: dict[bytes, bytes], fraction: float) -> tuple[list[bytes], list[bytes]]:
    """Divides documents, keyed by digest and in their order, into train and held-out."""
    if len(documents) == 1:
        (text,) = documents.values()
        cut = len(text) - max(1, round(len(text) * fraction))
        while 0 < cut < len(text) and text[cut] & 0xC0 == 0x80:  # within a character
            cut -= 1
        return [text[:cut]], [text[cut:]]
    held = held_out_of(np.array([int.from_bytes(d[:8]) for d in documents], np.uint64), fraction)
    return (
        [text for text, out in zip(documents.values(), held, strict=True) if not out],
        [text for text, out in zip(documents.values(), held, strict=True) if out],
    )


def held_out_of(digests: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Which of two or more documents are held out: at least one, and not all.

    Args:
      digests: the first 8 bytes of the SHA-256 of each.
      fraction: of their range that is held out.
    """
    held = digests / np.float64(2**64) < fraction
    order = np.argsort(digests, kind="stable")
    held[order[:1]] = True
    held[order[-1:]] = False
    return held


def _fingerprint(train: list[bytes], held_out: list[bytes]) -> str:
    digest = hashlib.sha256()
    for documents in (train, held_out):
        digest.update(len(documents).to_bytes(8))
        for text in documents:
            digest.update(len(text).to_bytes(8))
            digest.update(text)
    return digest.hexdigest()
