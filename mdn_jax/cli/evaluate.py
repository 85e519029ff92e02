"""`mdn-eval`: how well a checkpoint predicts text, or answers multiple-choice questions."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from mdn_jax.cli.common import CheckpointConfig, open_checkpoint, parse_command, run
from mdn_jax.cli.documents import TextConfig, open_documents
from mdn_jax.errors import RunError
from mdn_jax.evaluation.multiple_choice import answer_questions, read_questions
from mdn_jax.evaluation.token_losses import Row, packed_rows, strided_rows, token_losses
from mdn_jax.models.loss import IGNORED
from mdn_jax.new_file import write_text
from mdn_jax.text.text import Text

PROGRAM = "mdn-eval"


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig(TextConfig):
    """Perplexity of a checkpoint over files."""

    mode: Literal["strided", "packed"] = "strided"
    """Windows over each document, or rows cut from the concatenated documents, as in training."""

    window: int = 1024
    """Tokens in a window or row."""

    stride: int | None = None
    """Tokens from one window to the next ("strided"); None: half a window."""

    batch_size: int = 8
    """Windows or rows in one call."""

    json: bool = False
    """Print the results as JSON."""

    def __post_init__(self) -> None:
        _check("files", self.files, "at least one name", len(self.files) > 0)
        stride = self.window if self.stride is None else self.stride
        _check("window", self.window, "an int >= 1", self.window >= 1)
        _check("batch_size", self.batch_size, "an int >= 1", self.batch_size >= 1)
        expected = f"an int from 1 to window = {self.window} or None"
        _check("stride", self.stride, expected, 1 <= stride <= self.window)


@dataclass(frozen=True, kw_only=True)
class ChoicesConfig(CheckpointConfig):
    """Accuracy of a checkpoint on multiple-choice questions, by log-likelihood."""

    file: Path
    """JSONL: {"context" or "question": text, "choices": [text, ...], "answer": index} a line."""

    separator: str = " "
    """Text between the context and each choice."""

    batch_size: int = 8
    """Choices in one call."""

    output: Path | None = None
    """Write every question's answer to this JSONL file."""

    json: bool = False
    """Print the results as JSON."""

    def __post_init__(self) -> None:
        _check("batch_size", self.batch_size, "an int >= 1", self.batch_size >= 1)


def _check(name: str, value: object, expected: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    commands: dict[str, Callable[[Any], int]] = {"perplexity": _perplexity, "choices": _choices}
    return run(PROGRAM, parse_command(PROGRAM, __doc__, commands, arguments))


def _perplexity(config: PerplexityConfig) -> int:
    """Perplexity of a checkpoint over files."""
    model, text, texts = open_documents(config)
    began = time.perf_counter()
    documents = [text.document(document) for document in texts]
    rows = _rows(config, documents)
    scored = sum(int(np.sum(row.targets != IGNORED)) for row in rows)
    if not scored:
        raise RunError("files: expected text of more than one token, got none")
    nats = 0.0
    losses = token_losses(model, rows, batch_size=config.batch_size, width=config.window)
    for loss in _progress(losses, len(rows), "row"):
        nats += float(np.sum(loss, dtype=np.float64))
    size = _bytes(text, texts, documents)
    _report(
        config.json,
        {
            "nats_per_token": nats / scored,
            "perplexity": math.exp(nats / scored) if nats / scored < 700 else math.inf,
            "nats_per_byte": nats / size,
            "bits_per_byte": nats / size / math.log(2),
            "tokens": scored,
            "bytes": size,
            "documents": len(documents),
            "seconds": time.perf_counter() - began,
        },
    )
    return 0


def _choices(config: ChoicesConfig) -> int:
    """Accuracy of a checkpoint on multiple-choice questions, by log-likelihood."""
    questions = read_questions(config.file.expanduser())
    model, text = open_checkpoint(config)
    began = time.perf_counter()
    answers = answer_questions(
        model, text, questions, separator=config.separator, batch_size=config.batch_size
    )
    answered = list(_progress(answers, len(questions), "question"))
    right = [q.answer == a.likeliest for q, a in zip(questions, answered, strict=True)]
    by_length = [
        q.answer == a.likeliest_by_length for q, a in zip(questions, answered, strict=True)
    ]
    if config.output is not None:
        lines = [json.dumps(answer._asdict()) + "\n" for answer in answered]
        write_text(config.output, "".join(lines))
    _report(
        config.json,
        {
            "accuracy": float(np.mean(right)),
            "accuracy_by_length": float(np.mean(by_length)),
            "chance": float(np.mean([1 / len(q.choices) for q in questions])),
            "questions": len(questions),
            "seconds": time.perf_counter() - began,
        },
    )
    return 0


def _rows(config: PerplexityConfig, documents: Sequence[list[int]]) -> list[Row]:
    if config.mode == "packed":
        return packed_rows(documents, width=config.window)
    stride = max(1, config.window // 2) if config.stride is None else config.stride
    return list(strided_rows(documents, width=config.window, stride=stride))


def _bytes(text: Text, texts: Sequence[str], documents: Sequence[list[int]]) -> int:
    total = sum(len(document.encode(errors="surrogateescape")) for document in texts)
    return max(1, total - sum(text.bytes_of_first(document) for document in documents))


def _progress[T](items: Iterable[T], total: int, unit: str) -> Iterable[T]:
    return tqdm(items, total=total, unit=unit, disable=not sys.stderr.isatty())


def _report(as_json: bool, results: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps({k: v if math.isfinite(v) else None for k, v in results.items()}))
        return
    width = max(map(len, results))
    for name, value in results.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        print(f"{name.replace('_', ' '):{width}}  {shown}")


if __name__ == "__main__":
    sys.exit(main())
