"""Documents of a corpus: without copies, as many as a domain may have, some of them held out."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.corpus.recipe import Domain
from benchmarks.corpus.texts import Source, read_texts
from mdn_jax.new_file import new_file
from mdn_jax.text.corpus import digest_of, place

TRAIN, TEST = "documents", "test"
"""Directories of the two sets, a file a domain."""
_PARAGRAPHS = re.compile(r"\n\s*\n")
_DIGITS = str.maketrans("123456789", "000000000")
_SHORT = 40  # characters; shorter paragraphs say nothing about where they come from
_COPIED = 0.5  # share of a document in paragraphs of others that makes it a copy


class Kept(NamedTuple):
    """What a domain has after copies are out.

    Attributes:
      domain: its name.
      found: bytes of the texts of its packages.
      exact: bytes of texts that were there before.
      near: bytes of texts of which half or more was there before.
      train: bytes of the documents to train on.
      test: bytes of the documents held out.
      train_documents: their number.
      test_documents: their number.
      packages: bytes kept of each package.
      sha256: digest of the documents.
    """

    domain: str
    found: int
    exact: int
    near: int
    train: int
    test: int
    train_documents: int
    test_documents: int
    packages: dict[str, int]
    sha256: str


class Copies:
    """What was there before: digests of documents and of paragraphs."""

    def __init__(self) -> None:
        self._documents: set[bytes] = set()
        self._paragraphs: set[bytes] = set()

    def is_exact(self, digest: bytes) -> bool:
        """Whether a document was there before; the next time it was."""
        before = digest in self._documents
        self._documents.add(digest)
        return before

    def is_near(self, text: str) -> bool:
        """Whether half of a document is in paragraphs of others; if not, it is one of them.

        Blanks, digits and case do not count.
        """
        hashes: dict[bytes, int] = {}
        for paragraph in _PARAGRAPHS.split(text):
            plain = " ".join(paragraph.translate(_DIGITS).lower().split())
            if len(plain) >= _SHORT:
                key = hashlib.blake2b(plain.encode(), digest_size=8).digest()
                hashes[key] = hashes.get(key, 0) + len(plain)
        total = sum(hashes.values())
        seen = sum(size for key, size in hashes.items() if key in self._paragraphs)
        if total and seen >= _COPIED * total:
            return True
        self._paragraphs.update(hashes)
        return False


def write_documents(
    domains: Sequence[Domain],
    sources: Sequence[Source],
    directory: Path,
    output: Path,
    *,
    scale: float,
    test_fraction: float,
) -> list[Kept]:
    """Writes the documents of every domain, to train on and held out.

    Documents are taken in the order of the ends of their digests, so that what a full domain keeps
    is a sample, and the same one for the same packages. The beginnings decide which are held out.

    Args:
      domains: of the recipe.
      sources: packages that there are.
      directory: of their texts.
      output: `documents` and `test` in it have a file a domain.
      scale: factor of the domains' sizes.
      test_fraction: share of the documents that are held out.

    Returns:
      What each domain has that has any text.
    """
    copies = Copies()
    kept = []
    for name in (TRAIN, TEST):
        (output / name).mkdir(parents=True, exist_ok=True)
    for domain in domains:
        texts = [
            (digest_of(text.encode()), source.name, text)
            for source in sources
            if source.domain == domain.name
            for text in read_texts(directory, source, domain.without)
        ]
        if texts:
            texts.sort(key=lambda text: text[0][::-1])
            most = round(domain.most_mb * 1e6 * scale)
            kept.append(_write_domain(domain.name, texts, copies, output, most, test_fraction))
    return kept


def _write_domain(
    domain: str,
    texts: Iterable[tuple[bytes, str, str]],
    copies: Copies,
    output: Path,
    most: int,
    test_fraction: float,
) -> Kept:
    bytes_of = dict.fromkeys(("found", "exact", "near", "train", "test"), 0)
    documents = dict.fromkeys(("train", "test"), 0)
    packages: dict[str, int] = {}
    all_of_them = hashlib.sha256()
    with (
        new_file(output / TRAIN / f"{domain}.jsonl") as train,
        new_file(output / TEST / f"{domain}.jsonl") as test,
        train.open("w") as train_file,
        test.open("w") as test_file,
    ):
        files = {"train": train_file, "test": test_file}
        for digest, package, text in texts:
            size = len(text.encode())
            bytes_of["found"] += size
            if bytes_of["train"] + bytes_of["test"] + size > most:
                continue
            if copies.is_exact(digest):
                bytes_of["exact"] += size
                continue
            if copies.is_near(text):
                bytes_of["near"] += size
                continue
            part = "test" if place(digest) >= 1 - test_fraction else "train"
            files[part].write(json.dumps({"text": text}) + "\n")
            bytes_of[part] += size
            documents[part] += 1
            packages[package] = packages.get(package, 0) + size
            all_of_them.update(digest)
    return Kept(
        domain=domain,
        **bytes_of,
        train_documents=documents["train"],
        test_documents=documents["test"],
        packages=packages,
        sha256=all_of_them.hexdigest(),
    )
