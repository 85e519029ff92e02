"""`python -m train tokenize`: files to shards of tokens, which training maps instead of reading."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from mdn_jax.cli.common import parse, run
from mdn_jax.cli.documents import FilesConfig
from mdn_jax.text.files import shown
from train import PROGRAM as TRAIN
from train.config_sections import DataConfig
from train.data.tokenizing import write_shards

PROGRAM = f"{TRAIN} tokenize"


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig(FilesConfig):
    """Tokenises files into shards; the same command goes on after an interruption."""

    output: tyro.conf.Positional[Path]
    """Directory for the shards; training takes it as --data.files."""

    tokenizer: str = "bytes"
    """A tokenizer.json, a directory with one or with GPT-2's vocab.json and merges.txt, or
    "bytes"."""

    start_token: str | None = None
    """Token that opens every document; None: what the tokenizer adds by itself, or <|endoftext|>
    if it adds nothing and has that token."""

    shard_mb: float = 64.0
    """MB (1e6 bytes) of the files in one shard, about; text files are not cut."""

    processes: int = os.cpu_count() or 1
    """Processes that work at the same time."""

    def __post_init__(self) -> None:
        for name in ("shard_mb", "processes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)!r}")
        if not self.files:
            raise ValueError("files: expected at least one name, got none")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    config = parse(PROGRAM, __doc__, TokenizeConfig, arguments)
    return run(PROGRAM, lambda: _tokenize(config))


def _tokenize(config: TokenizeConfig) -> int:
    began = time.perf_counter()
    data = DataConfig(
        files=config.files,
        format=config.format,
        field=config.field,
        split=config.split,
        tokenizer=config.tokenizer,
        start_token=config.start_token,
    )
    headers, before = write_shards(
        data,
        config.output,
        shard_bytes=max(1, round(config.shard_mb * 1e6)),
        processes=config.processes,
    )
    print(
        f"{shown(config.output)}: {sum(h.documents for h in headers):,} documents, "
        f"{sum(h.tokens for h in headers):,} tokens of {headers[0].vocab_size:,} in "
        f"{len(headers)} shards ({before} of them there before), "
        f"{time.perf_counter() - began:.1f} s"
    )
    return 0
