"""What is in a corpus: packages, licences, sizes, as a person reads it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

MANIFEST = "manifest.json"
HELD_OUT = 0.01
"""Share of the training shards that runs hold out, to choose between runs."""


def read_manifest(corpus: Path) -> dict[str, Any]:
    """The manifest of a corpus.

    Raises:
      SystemExit: there is none.
    """
    try:
        values: dict[str, Any] = json.loads((corpus / MANIFEST).read_text())
    except (OSError, ValueError):
        raise SystemExit(
            f"corpus: expected a directory of `python -m benchmarks corpus`, got {corpus} without "
            f"a {MANIFEST}"
        ) from None
    return values


def table(manifest: Mapping[str, Any]) -> str:
    """Domains, packages and shards as tables."""

    def mb(size: float) -> str:
        return f"{size / 1e6:.1f}"

    domains = [
        [
            d["domain"],
            mb(d["found"]),
            mb(d["exact"]),
            mb(d["near"]),
            mb(d["train"]),
            f"{d['train_documents']:,}",
            mb(d["test"]),
            f"{d['test_documents']:,}",
        ]
        for d in manifest["domains"]
    ]
    total = sum(d["train"] + d["test"] for d in manifest["domains"])
    packages = [
        [s["domain"], s["name"], s["version"], s["licence"], mb(s["kept"]), s["sha256"][:12]]
        for s in manifest["sources"]
    ]
    shards = [
        [
            s["directory"],
            f"{s['documents']:,}",
            f"{s['tokens']:,}",
            mb(s["bytes"]),
            mb(s["compressed"]),
        ]
        for s in manifest["shards"]
    ]
    missing = [f"- {m['name']}: {m['reason']}" for m in manifest["missing"]]
    parts = [
        f"{mb(total)} MB of text from {len(packages)} packages; "
        f"{manifest['vocabulary']:,} tokens in the vocabulary.",
        _markdown(
            domains,
            ["domain", "found MB", "copies MB", "near MB", "train MB", "files", "test MB", "files"],
        ),
        _markdown(packages, ["domain", "package", "version", "licences", "kept MB", "SHA-256"]),
        _markdown(shards, ["shards", "documents", "tokens", "MB", "MB after gzip"]),
        "\n".join(["Left out:", *missing] if missing else ["No package is left out."]),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown(rows: list[list[str]], headers: list[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
