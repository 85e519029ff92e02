"""The texts of packages, each package's in a file of its own; packages in several processes."""

import collections
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from benchmarks.corpus.extraction import (
    can_read_man,
    is_worth_reading,
    pieces_of,
    suffix_of,
    text_of,
)
from benchmarks.corpus.packages import (
    Package,
    Unavailable,
    fetch,
    files_of,
    find,
    licence_path,
    licences,
)
from benchmarks.corpus.recipe import Domain
from mdn_jax.new_file import new_file, write_text


class Source(NamedTuple):
    """A package and what was taken from it.

    Attributes:
      domain: of the recipe.
      name: of the package.
      version: of the package.
      sha256: of its file.
      licence: as its debian/copyright names it.
      files: that the recipe asks for.
      documents: that are text worth reading.
      bytes: of these, UTF-8.
      left_out: files by the reason why they were not.
    """

    domain: str
    name: str
    version: str
    sha256: str
    licence: str
    files: int
    documents: int
    bytes: int
    left_out: dict[str, int]


class Missing(NamedTuple):
    """A package that could not be had.

    Attributes:
      name: of the package.
      reason: in words.
    """

    name: str
    reason: str


class _Job(NamedTuple):
    domain: str
    package: Package
    suffixes: frozenset[str]
    parts: tuple[str, ...]
    file: Path
    texts: Path


def extract(
    domains: Sequence[Domain], directory: Path, *, processes: int
) -> tuple[list[Source], list[Missing]]:
    """Fetches the packages and writes their texts; what is in the directory already stays.

    Args:
      domains: of the recipe.
      directory: `packages` in it has the files of packages, `texts` their texts.
      processes: that work at the same time.

    Returns:
      What there is, in the order of the recipe, and what could not be had.
    """
    texts = directory / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    found: dict[str, Source] = {}
    missing: dict[str, str] = {}
    jobs = []
    for domain in domains:
        for name, parts in domain.packages.items():
            if (source := _known(texts, domain, name)) is not None:
                found[name] = source
                continue
            try:
                package = find(name)
                file = fetch(package, directory / "packages")
            except Unavailable as reason:
                missing[name] = str(reason)
                print(f"{name}: left out: {reason}", flush=True)
                continue
            jobs.append(_Job(domain.name, package, domain.suffixes, parts, file, texts))
    jobs.sort(key=lambda job: -job.package.size)  # the longest first
    context = multiprocessing.get_context("forkserver")  # threads of jax do not live on in a fork
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        running = {pool.submit(_extract, job): job for job in jobs}
        for future in as_completed(running):
            name = running[future].package.name
            try:
                source = found[name] = future.result()
            except Unavailable as reason:
                missing[name] = str(reason)
                print(f"{name}: left out: {reason}", flush=True)
                continue
            print(
                f"{name} {source.version}: {source.documents:,} documents, "
                f"{source.bytes / 1e6:.1f} MB",
                flush=True,
            )
    order = [name for domain in domains for name in domain.packages]
    return (
        [found[name] for name in order if name in found],
        [Missing(name, missing[name]) for name in order if name in missing],
    )


def _known(texts: Path, domain: Domain, name: str) -> Source | None:
    """What an earlier call took from a package for the same domain, with the same choice."""
    path = texts / f"{name}.json"
    if not path.exists():
        return None
    values = json.loads(path.read_text())
    choice = values.pop("choice")
    if choice != _choice(domain.name, domain.suffixes, domain.packages[name]):
        return None
    return Source(**values)


def _choice(domain: str, suffixes: frozenset[str], parts: Sequence[str]) -> list[object]:
    return [domain, sorted(suffixes), list(parts)]


def read_texts(directory: Path, source: Source, without: Sequence[str]) -> Iterator[str]:
    """The texts of a package that `extract` wrote.

    Args:
      directory: as of `extract`.
      source: from it.
      without: parts that no file's path may have.
    """
    with (directory / "texts" / f"{source.name}.jsonl").open() as file:
        for line in file:
            record = json.loads(line)
            if not any(part in record["path"] for part in without):
                yield record["text"]


def _extract(job: _Job) -> Source:
    name = job.package.name
    licence = licence_path(name)
    man = can_read_man()

    def wanted(path: str) -> bool:
        if path in (licence, f"{licence}.gz"):
            return True
        if suffix_of(path) not in job.suffixes or "/_sources/" in path:
            return False
        return not job.parts or any(part in path for part in job.parts)

    terms: bytes | None = None
    files = documents = size = 0
    left_out: collections.Counter[str] = collections.Counter()
    with new_file(job.texts / f"{name}.jsonl") as temporary, temporary.open("w") as out:
        for path, data in files_of(job.file, wanted):
            if path.startswith(licence):
                terms = data
                continue
            files += 1
            if "/man/man" in path and not man:
                left_out["man pages need groff"] += 1
                continue
            try:
                text = text_of(path, data)
            except ValueError as error:
                left_out[str(error).split(":")[0]] += 1
                continue
            for piece in pieces_of(text):
                if not is_worth_reading(piece):
                    left_out["short, repeated or no text"] += 1
                    continue
                out.write(json.dumps({"path": path, "text": piece}) + "\n")
                documents, size = documents + 1, size + len(piece.encode())
    source = Source(
        domain=job.domain,
        name=name,
        version=job.package.version,
        sha256=job.package.sha256,
        licence=licences(terms),
        files=files,
        documents=documents,
        bytes=size,
        left_out=dict(left_out),
    )
    values = source._asdict() | {"choice": _choice(job.domain, job.suffixes, job.parts)}
    write_text(job.texts / f"{name}.json", json.dumps(values, indent=1) + "\n")
    return source
