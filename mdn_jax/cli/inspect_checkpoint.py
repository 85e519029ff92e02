"""`mdn-inspect`: what the gates of a checkpoint do on text, and how stable that is."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tabulate import tabulate

from mdn_jax.analysis.inspection import HeadReport, record_steps, report_layer, to_json
from mdn_jax.analysis.inspection_figures import draw_eigenvalues, draw_gates, draw_half_lives, short
from mdn_jax.cli.common import parse, run
from mdn_jax.cli.documents import TextConfig, open_documents
from mdn_jax.errors import RunError
from mdn_jax.evaluation.token_losses import Row, packed_rows
from mdn_jax.new_file import write_text

PROGRAM = "mdn-inspect"
JSON_FILE = "inspection.json"
FIGURES = ("eigenvalues.png", "half_life.png", "gates.png")


@dataclass(frozen=True, kw_only=True)
class InspectConfig(TextConfig):
    """Gates, eigenvalues and half-lives of every layer and head of a checkpoint on text."""

    files: tuple[str, ...] = ()
    """Files or globs ('**' crosses directories): text, JSONL or Parquet, by their suffix; none: the
    documents that a run on the standard library's source text holds out."""

    tokens: int = 16_384
    """Tokens to look at, in rows at even distances over the text."""

    row: int = 512
    """Tokens in a row."""

    batch_size: int = 8
    """Rows in one call."""

    window: int = 64
    """Steps in a window of the norm growth."""

    output_dir: Path | None = None
    """Directory of the JSON file and the figures; None: `inspection` in the checkpoint's."""

    json: bool = False
    """Print the results as JSON in place of the table."""

    def __post_init__(self) -> None:
        for name in ("tokens", "row", "batch_size", "window"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {value!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    config = parse(PROGRAM, __doc__, InspectConfig, arguments)
    return run(PROGRAM, partial(_inspect, config))


def _inspect(config: InspectConfig) -> int:
    model, text, texts = open_documents(config)
    rows = choose_rows([text.document(x) for x in texts], width=config.row, tokens=config.tokens)
    layers = record_steps(model, rows, batch_size=min(config.batch_size, len(rows)))
    if not layers:
        raise RunError(
            f"checkpoint: expected a model with MDN layers in {config.checkpoint}, got one "
            "without any"
        )
    reports = [
        report
        for layer, steps in layers.items()
        for report in report_layer(layer, steps, window=config.window)
    ]
    count = sum(len(row.tokens) for row in rows)
    results = {
        "checkpoint": str(config.checkpoint),
        "tokens": count,
        "rows": len(rows),
        "window": config.window,
        "heads": [to_json(report) for report in reports],
    }
    directory = config.output_dir or config.checkpoint / "inspection"
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / JSON_FILE, json.dumps(results, indent=1) + "\n")
    eigenvalues, half_life, gates = (directory / name for name in FIGURES)
    draw_eigenvalues(layers, eigenvalues)
    draw_half_lives(reports, half_life)
    draw_gates(layers, gates)
    if config.json:
        print(json.dumps(results))
        return 0
    print(f"{count:,} tokens in {len(rows)} rows of {len(rows[0].tokens)}")
    print(table(reports, config.window))
    print(f"in {directory}: {', '.join((JSON_FILE, *FIGURES))}")
    return 0


def choose_rows(documents: Sequence[Sequence[int]], *, width: int, tokens: int) -> list[Row]:
    """Rows of one width at even distances over the documents, packed as in training.

    Args:
      documents: their tokens.
      width: tokens of a row; shorter text is one row of its own length.
      tokens: in all rows, about; one row at least.

    Raises:
      RunError: text of less than two tokens.
    """
    if sum(map(len, documents)) < 2:
        raise RunError("files: expected text of more than one token, got none")
    rows = packed_rows(documents, width=width)
    rows = [row for row in rows if len(row.tokens) == width] or rows[:1]
    count = min(len(rows), max(1, tokens // len(rows[0].tokens)))
    return [rows[i * len(rows) // count] for i in range(count)]


def table(reports: Sequence[HeadReport], window: int) -> str:
    """One line a head: medians with the quantiles of 5 and 95 % of the gates behind them."""

    def spread(values: tuple[float, ...]) -> str:
        low, _, middle, _, high = values
        return f"{middle:.2f} ({low:.2f}-{high:.2f})"

    lines: list[list[Any]] = [
        [
            report.layer,
            report.head,
            *(spread(x) for x in (report.alpha, report.mu, report.beta, report.eta)),
            f"{report.oscillating:.0%}",
            "-" if report.period is None else short(report.period),
            f"{report.spectral_radius[2]:.3f}",
            f"{report.spectral_radius[4]:.3f}",
            f"{report.load:.2f}",
            f"{report.window_growth:.2g}",
            *(
                short(x)
                for x in (report.memory_half_life, report.momentum_half_life, report.key_half_life)
            ),
        ]
        for report in reports
    ]
    headers = ["layer", "head", "decay α", "momentum μ", "step β", "write η", "complex\nsteps"]
    headers += [
        "period\nsteps",
        "radius\nmedian",
        "radius\n95 %",
        "load\nmax",
        f"growth\nin {window}",
    ]
    headers += ["memory\nhalf-life", "momentum\nhalf-life", "key\nhalf-life"]
    right = ["right"] * len(headers)
    return tabulate(lines, headers=headers, colalign=right, disable_numparse=True)


if __name__ == "__main__":
    sys.exit(main())
