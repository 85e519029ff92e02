"""`python -m train plot`: draws the curves of one or several runs."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from mdn_jax.cli.common import parse, run
from mdn_jax.errors import RunError
from train import PROGRAM as TRAIN
from train.checkpointing.run_directory import METRICS_FILE, config_int, read_config
from train.metrics.curves import Abscissa, Curve, plot_curves
from train.metrics.log import Record, scan_metrics

PROGRAM = f"{TRAIN} plot"


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Training and held-out loss, gradient norm and speed of runs, in one picture."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Output directories of runs, finished or not."""

    output: Path = Path("curves.png")
    """PNG file to write."""

    names: tuple[str, ...] = ()
    """Names in the legend, one a run; none: those of the directories."""

    x: Abscissa = "step"
    """The horizontal axis."""

    smooth: int = 1
    """Lines of metrics that a running mean of the training loss goes over; 1: no mean."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs: expected at least one directory, got none")
        if self.names and len(self.names) != len(self.runs):
            raise ValueError(
                f"names: expected {len(self.runs)} (one a run) or none, got {len(self.names)}"
            )
        if self.smooth < 1:
            raise ValueError(f"smooth: expected an int >= 1, got {self.smooth}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: without the program's name; None means `sys.argv`.

    Returns:
      The exit status: 0, or 1 for an error in what the user asked for.
    """
    config = parse(PROGRAM, __doc__, PlotConfig, arguments)
    return run(PROGRAM, partial(plot, config))


def plot(config: PlotConfig) -> int:
    """Draws the picture."""
    names = config.names or _names(config.runs)
    curves = [_read(path, name) for path, name in zip(config.runs, names, strict=True)]
    _check_units(config.runs, curves)
    plot_curves(curves, config.output, x=config.x, smooth=config.smooth)
    print(f"{', '.join(names)}: {config.output}")
    return 0


def _names(runs: Sequence[Path]) -> list[str]:
    """The last parts of the paths; the whole paths where these are not unique."""
    names = [path.absolute().name for path in runs]
    return names if len(set(names)) == len(names) else [str(path) for path in runs]


def _read(directory: Path, name: str) -> Curve:
    metrics = directory / METRICS_FILE
    if not metrics.is_file():
        raise RunError(f"runs: expected a directory with {METRICS_FILE}, got {directory}")
    records, broken = read = scan_metrics(metrics)
    if broken:
        print(f"{PROGRAM}: {read.describe(metrics)}", file=sys.stderr)
    if not records:
        raise RunError(f"runs: expected metrics of at least one step, got none in {metrics}")
    saved = read_config(directory)
    rows, length = (config_int(directory, saved, x) for x in ("batch_size", "sequence_length"))
    return Curve(name, records, rows * length, _bytes_per_token(records))


def _check_units(runs: Sequence[Path], curves: Sequence[Curve]) -> None:
    """nats/token and nats/byte have to meet in the latter."""
    for path, curve in zip(runs, curves, strict=True):
        if math.isnan(curve.bytes_per_token) and any(run.bytes_per_token == 1 for run in curves):
            raise RunError(
                "runs: expected held-out losses in all of them, to have nats/byte (tokens are "
                f"bytes in one), got none in {path}"
            )


def _bytes_per_token(records: Sequence[Record]) -> float:
    """Of the held-out documents; nan: no loss of theirs, so the tokens may be anything."""
    for record in reversed(records):
        per_token, per_byte = (record.get(f"held_out_{x}") for x in ("loss", "nats_per_byte"))
        if per_token and per_byte:
            return per_token / per_byte
    return math.nan
