"""Curves of one or several runs in one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from mdn_jax.new_file import new_file
from train.metrics.log import Record

Abscissa = Literal["step", "tokens"]


class Curve(NamedTuple):
    """What is drawn of a run.

    Attributes:
      name: in the legend.
      records: lines of its metrics file.
      tokens_per_step: tokens in a step's batch.
      bytes_per_token: of its documents; 1 if tokens are bytes.
    """

    name: str
    records: Sequence[Record]
    tokens_per_step: int
    bytes_per_token: float


class _Panel(NamedTuple):
    key: str
    label: str
    scale: Literal["linear", "log"] = "linear"
    marker: str = ""


_PANELS = (
    _Panel("loss", "training loss"),
    _Panel("held_out_loss", "held-out loss", marker="o"),
    _Panel("grad_norm", "gradient norm, before clipping", scale="log"),
    _Panel("tokens_per_second", "speed (tokens/s)"),
)
_LOSSES = ("loss", "held_out_loss")


def plot_curves(
    runs: Sequence[Curve], path: Path, *, x: Abscissa = "step", smooth: int = 1
) -> None:
    """Draws losses, gradient norm and speed against steps or tokens.

    Losses are in nats/token, or in nats/byte if tokens are bytes in some of the runs.

    Args:
      runs: at least one.
      path: PNG file to write, whole or not at all.
      x: the horizontal axis.
      smooth: lines of metrics that a running mean of the training loss goes over; the loss itself
        is drawn pale behind it.
    """
    in_bytes = any(run.bytes_per_token == 1 for run in runs)
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    colors = colormaps["tab10"].colors  # type: ignore[attr-defined]
    grid = figure.subplots(2, 2, sharex=True)
    for axes, panel in zip(grid.flat, _PANELS, strict=True):
        for i, run in enumerate(runs):
            width = smooth if panel.key == "loss" else 1
            unit = run.bytes_per_token if panel.key in _LOSSES and in_bytes else 1.0
            _draw(axes, panel, run, x, color=colors[i % len(colors)], smooth=width, unit=unit)
        of = f" (nats/{'byte' if in_bytes else 'token'})" if panel.key in _LOSSES else ""
        axes.set(ylabel=panel.label + of, yscale=panel.scale)
        axes.grid(alpha=0.3)
        if panel.scale == "log":
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        if panel.key == "tokens_per_second":
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    figure.align_ylabels(grid)
    for axes in grid[-1]:
        axes.set_xlabel("step" if x == "step" else "tokens trained on")
        axes.xaxis.set_major_formatter(EngFormatter(sep=" ") if x == "tokens" else "{x:,.0f}")
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(4, len(runs)))
    with new_file(path) as temporary:
        canvas.print_png(temporary)


def _draw(
    axes: Axes,
    panel: _Panel,
    run: Curve,
    x: Abscissa,
    *,
    color: Any,
    smooth: int,
    unit: float,
) -> None:
    rows = [record for record in run.records if panel.key in record]
    if not rows:
        return
    factor = 1 if x == "step" else run.tokens_per_step
    steps = np.array([row["step"] for row in rows], float) * factor
    # what was not finite is null in the file and a gap here
    values = np.array([row[panel.key] for row in rows], float) / unit
    if smooth > 1:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        values = _running_mean(values, smooth)
    options: Mapping[str, Any] = {"marker": panel.marker, "markersize": 4, "linewidth": 1.4}
    axes.plot(steps, values, color=color, label=run.name, **options)


def _running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Mean of each value and those before it, `width` at most; what is not finite left out."""
    finite = np.isfinite(values)
    sums = np.cumsum(np.where(finite, values, 0.0))
    counts = np.cumsum(finite)
    sums[width:] -= sums[:-width].copy()
    counts[width:] -= counts[:-width].copy()
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
