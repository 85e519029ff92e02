"""`python -m benchmarks corpus`: text and source code from packages anyone can install."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.corpus.documents import Kept, write_documents
from benchmarks.corpus.manifest import HELD_OUT, MANIFEST, table
from benchmarks.corpus.packages import check_tools
from benchmarks.corpus.recipe import RECIPE, Domain, read_recipe
from benchmarks.corpus.texts import Source, extract
from benchmarks.corpus.tokens import train_tokenizer, write_all_shards
from mdn_jax.new_file import write_text


@dataclass(frozen=True)
class CorpusConfig:
    """Builds a corpus on a Debian system, as an ordinary user, with apt's own tools.

    Packages are downloaded and read, never installed. A command that was cut short goes on; one
    that is complete says what there is.
    """

    output: Path = Path("runs/corpus")
    """Directory of documents, tokenizer, shards, `manifest.json` and `manifest.md`."""
    cache: Path | None = None
    """Directory of downloaded packages and their texts, which corpora may share; None: output."""
    recipe: Path = RECIPE
    """Packages by domain, with the size of each domain."""
    domains: tuple[str, ...] = ()
    """Of the recipe; none: all."""
    scale: float = 1.0
    """Factor of the domains' sizes."""
    test_fraction: float = 0.02
    """Share of the documents held out for the final measurements, a set a domain."""
    vocabulary: int = 16_384
    """Tokens of the BPE."""
    sample_mb: float = 100.0
    """MB of text that the BPE is trained on, about."""
    processes: int = os.cpu_count() or 1
    """Processes that work at the same time."""

    def __post_init__(self) -> None:
        for name in ("scale", "sample_mb"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {value!r}")
        if not 0 < self.test_fraction < 1:
            raise ValueError(
                f"test_fraction: expected a number above 0 and below 1, got {self.test_fraction!r}"
            )
        if not 512 <= self.vocabulary <= 65_536:
            raise ValueError(f"vocabulary: expected from 512 to 65536, got {self.vocabulary!r}")
        if self.processes < 1:
            raise ValueError(f"processes: expected an int >= 1, got {self.processes!r}")


def corpus(config: Annotated[CorpusConfig, tyro.conf.arg(name="")]) -> None:
    """Packages to texts, texts to documents, documents to tokens; then the manifest."""
    from mdn_jax.errors import RunError

    check_tools()
    domains = _chosen(config)
    try:
        _build(config, domains)
    except RunError as error:
        raise SystemExit(f"corpus: {error}") from None
    except OSError as error:
        raise SystemExit(f"corpus: expected to write to {config.output}, got: {error}") from None


def _chosen(config: CorpusConfig) -> list[Domain]:
    domains = read_recipe(config.recipe)
    names = [domain.name for domain in domains]
    for name in config.domains:
        if name not in names:
            raise SystemExit(f"domains: expected some of {', '.join(names)}, got {name!r}")
    return [domain for domain in domains if not config.domains or domain.name in config.domains]


def _build(config: CorpusConfig, domains: Sequence[Domain]) -> None:
    cache = config.cache or config.output
    sources, missing = extract(domains, cache, processes=config.processes)
    if not any(source.documents for source in sources):
        why = missing[0].reason if missing else "packages without any text"
        raise SystemExit(
            f"corpus: expected at least one package, got none of {len(missing)}: {why}"
        )
    kept = _documents(config, domains, sources, cache)
    names = [one.domain for one in kept]
    train_tokenizer(names, config.output, vocabulary=config.vocabulary, sample_mb=config.sample_mb)
    shards = write_all_shards(names, config.output, processes=config.processes)
    manifest = {
        "held_out_fraction": HELD_OUT,
        "test_fraction": config.test_fraction,
        "vocabulary": config.vocabulary,
        "sources": [
            source._asdict() | {"kept": one.packages.get(source.name, 0)}
            for one in kept
            for source in sources
            if source.domain == one.domain
        ],
        "missing": [one._asdict() for one in missing],
        "domains": [one._asdict() for one in kept],
        "shards": [one._asdict() for one in shards],
    }
    write_text(config.output / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    text = table(manifest)
    write_text(config.output / "manifest.md", text)
    print(text)


def _documents(
    config: CorpusConfig, domains: Sequence[Domain], sources: Sequence[Source], cache: Path
) -> list[Kept]:
    """The documents of an earlier call with the same sources; else new ones, and no old tokens.

    Raises:
      SystemExit: a directory with the documents of others.
    """
    made_of: Any = [
        [[x.name, x.most_mb, sorted(x.suffixes), x.without] for x in domains],
        [[*source._asdict().values()] for source in sources],
        config.scale,
        config.test_fraction,
        config.vocabulary,
        config.sample_mb,
    ]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    marker = config.output / "documents.json"
    if marker.exists():
        known = json.loads(marker.read_text())
        if known["made_of"] != digest:
            raise SystemExit(
                "output: expected a new directory, or one of the same packages, sizes and "
                f"vocabulary, got {config.output} with another corpus"
            )
        return [Kept(**one) for one in known["kept"]]
    # what a call that was cut short made of documents that may have been others
    shutil.rmtree(config.output / "shards", ignore_errors=True)
    kept = write_documents(
        domains,
        sources,
        cache,
        config.output,
        scale=config.scale,
        test_fraction=config.test_fraction,
    )
    values = {"made_of": digest, "kept": [one._asdict() for one in kept]}
    write_text(marker, json.dumps(values, indent=1) + "\n")
    return kept
