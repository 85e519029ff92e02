"""Figures of `python -m benchmarks language`: a point is a seed, a line joins the means."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.style import STYLES
from mdn_jax.new_file import new_file

Record = Mapping[str, Any]


class Drawn(Protocol):
    """What is drawn of a model."""

    @property
    def name(self) -> str:
        """Of its style."""

    @property
    def label(self) -> str:
        """In the legend."""

    @property
    def runs(self) -> list[Record]:
        """A record a seed."""


def points(run: Record, part: str) -> dict[Any, float]:
    """What was measured of a run, what is not finite left out.

    Args:
      run: record.
      part: "domains" (bits by name), "positions" (nats by last place), "needle" (share of rows with
        all digits right by length), "curve" (bits by tokens trained on).
    """
    values: dict[Any, float | None]
    if part == "positions":
        values = {last: nats for _, last, nats in run[part]}
    elif part == "curve":
        values = dict(map(tuple, run[part]))
    elif part == "needle":
        values = {int(length): right for length, (right, _) in run[part].items()}
    else:
        values = dict(run[part])
    return {x: y for x, y in values.items() if y is not None}


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, FigureCanvasAgg(figure)


def _save(figure: Any, canvas: Any, handles: Mapping[str, Any], path: Path) -> None:
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    with new_file(path) as temporary:
        canvas.print_png(temporary)


def _plot(panel: Any, model: Drawn, part: str, handles: dict[str, Any]) -> None:
    """Points of the seeds and a line through their means."""
    colour, marker = STYLES[model.name]
    seeds = [points(run, part) for run in model.runs]
    xs = list(dict.fromkeys(x for seed in seeds for x in seed))
    if not xs:
        return
    means = [statistics.fmean(seed[x] for seed in seeds if x in seed) for x in xs]
    dashed = model.name == "attention" or model.name.endswith("hybrid")
    style: dict[str, Any] = {
        "color": colour,
        "linestyle": "--" if dashed else "-",
        "linewidth": 1.3,
    }
    panel.plot(xs, means, **style)
    every = seeds if part != "curve" else [dict([list(seed.items())[-1]]) for seed in seeds if seed]
    panel.plot(
        [x for seed in every for x in seed],
        [y for seed in every for y in seed.values()],
        color=colour,
        marker=marker,
        markersize=4.5,
        linestyle="",
    )
    (handles[model.label],) = panel.plot([], [], marker=marker, markersize=4.5, **style)


def draw_curves(models: Sequence[Drawn], path: Path) -> None:
    """Held-out bits per byte against tokens trained on."""
    figure, canvas = _figure(10, 5)
    panel, handles = figure.subplots(), dict[str, Any]()
    for model in models:
        _plot(panel, model, "curve", handles)
    ends = [y for m in models for run in m.runs for y in list(points(run, "curve").values())[-1:]]
    panel.set(xlabel="tokens trained on", ylabel="held-out bits per byte")
    if ends:  # they are compared; starts far above them are cut
        panel.set_ylim(min(ends) - 0.1 * max(ends), 1.4 * max(ends))
    panel.grid(alpha=0.3)
    _save(figure, canvas, handles, path)


def draw_tests(models: Sequence[Drawn], path: Path) -> None:
    """Bits per byte by domain, loss by position, rows with a needle that was found."""
    figure, canvas = _figure(17, 5)
    panels, handles = figure.subplots(1, 3), dict[str, Any]()
    _plot_domains(panels[0], models, handles)
    for panel, part in zip(panels[1:], ("positions", "needle"), strict=True):
        for model in models:
            _plot(panel, model, part, handles)
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="test bits per byte", title="by domain")
    panels[1].set(xlabel="tokens before", ylabel="nats per token", title="by position")
    panels[2].set(xlabel="tokens of the row", ylabel="rows with all digits right", title="needle")
    panels[2].set_ylim(-0.03, 1.03)
    for panel in panels[1:]:
        panel.set_xscale("log", base=2)
    _save(figure, canvas, handles, path)


def _plot_domains(panel: Any, models: Sequence[Drawn], handles: dict[str, Any]) -> None:
    """Points of the seeds, the models side by side."""
    found = [[points(run, "domains") for run in model.runs] for model in models]
    names = list(dict.fromkeys(name for runs in found for run in runs for name in run))
    for i, (model, runs) in enumerate(zip(models, found, strict=True)):
        colour, marker = STYLES[model.name]
        shift = 0.7 * ((i + 0.5) / len(models) - 0.5)
        xs = [names.index(name) + shift for run in runs for name in run]
        ys = [bits for run in runs for bits in run.values()]
        (line,) = panel.plot(xs, ys, marker, color=colour, markersize=4.5)
        handles[model.label] = line
    panel.set_xticks(range(len(names)), names, rotation=60, ha="right")


def draw_stability(models: Sequence[Drawn], path: Path) -> None:
    """Largest norm of a memory and largest growth of a state in training, a line a seed.

    A cross is at the last measurement before the first skipped step; what is not finite is a gap.
    """
    figure, canvas = _figure(13, 4.5)
    panels, handles = figure.subplots(1, 2), dict[str, Any]()
    for model in models:
        colour, marker = STYLES[model.name]
        for run in model.runs:
            found = run["stability"] or {}
            curve = found.get("curve") or []
            for i, panel in enumerate(panels, 1):
                xs = [row[0] for row in curve]
                ys = [float("nan") if row[i] is None else row[i] for row in curve]
                if not xs:
                    continue
                every = max(1, len(xs) // 8)
                options: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4}
                (line,) = panel.plot(xs, ys, linewidth=1, markevery=every, **options)
                handles[model.label] = line
                skipped = found["skipped_from"]
                before = [j for j, x in enumerate(xs) if skipped is None or x < skipped]
                if skipped is not None and before:
                    panel.plot(xs[before[-1]], ys[before[-1]], "x", color=colour, markersize=10)
    panels[0].set(ylabel="norm of a memory, largest layer")
    panels[1].set(ylabel="growth of a state in half a row, largest head")
    for panel in panels:
        panel.set(xlabel="step")
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
    _save(figure, canvas, handles, path)
