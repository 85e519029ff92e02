"""The figure of `python -m benchmarks length`, from its records."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.style import STYLES

_LABELS = {"rule": "the rule", "attention": "attention"}
_PASSES = {"forward": "forward", "both": "forward and backward"}


def draw(records: Sequence[Path], path: Path) -> None:
    """Nanoseconds a token against the tokens of a row, one panel a pass.

    Args:
      records: JSON of `--output`; the first one's rule is a full line, the next one's dashed.
      path: PNG file to write.
    """
    figure = Figure(figsize=(10.4, 4.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(1, 2, sharey=True)
    for record, line in zip(map(_read, records), ("-", "--", ":", "-."), strict=False):
        for axes, part in zip(grid, _PASSES, strict=True):
            for name, label in _LABELS.items():
                points = [x for x in record["results"] if (x["name"], x["part"]) == (name, part)]
                if not points:
                    continue
                lengths = [x["length"] for x in points]
                times = [1e9 * x["median"] / _tokens(record["config"], x["length"]) for x in points]
                color, marker = STYLES["attention" if name == "attention" else "mdn"]
                axes.plot(
                    lengths,
                    times,
                    line,
                    color=color,
                    marker=marker,
                    label=f"{label}, {_what(record['config'])}",
                )
    for axes, title in zip(grid, _PASSES.values(), strict=True):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(title=title, xlabel="tokens in a row")
        axes.grid(alpha=0.25)
    grid[0].set_ylabel("nanoseconds a token")
    grid[0].legend(loc="upper left")
    temporary = path.with_suffix(".tmp")
    canvas.print_png(temporary)
    temporary.replace(path)


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def _tokens(config: Any, length: int) -> int:
    """In a call."""
    rows: int | None = config["rows"]
    return config["tokens"] if rows is None else rows * length


def _what(config: Any) -> str:
    rows: int | None = config["rows"]
    return f"{config['tokens']:,} tokens a call" if rows is None else f"{rows} rows a call"
