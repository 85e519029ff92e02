"""The figures of `mdn-inspect`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mdn_jax import analysis
from mdn_jax.analysis.inspection import GATES, HeadReport, LayerSteps
from mdn_jax.new_file import new_file

_POINTS = 1500  # of a head in the complex plane
_SYMBOLS = {"alpha": "decay α", "mu": "momentum μ", "beta": "step size β", "eta": "write scale η"}
_LONGEST = 1e5  # tokens; a longer half-life has the colour of this one


def draw_eigenvalues(layers: Mapping[int, LayerSteps], path: Path) -> None:
    """Both eigenvalues of the steps along the key in the complex plane, a panel a layer."""
    columns = min(4 if len(layers) <= 8 else 6, len(layers))
    lines = math.ceil(len(layers) / columns)
    size = 4.0 if len(layers) <= 8 else 2.8
    figure = Figure(
        figsize=((size + 0.2) * columns + 0.4, size * lines + 0.8), layout="constrained"
    )
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 400))
    reach = 1.0
    for axes, (layer, steps) in zip(grid.flat, layers.items(), strict=False):
        gates = [x.reshape(-1, x.shape[-1]) for x in (*steps.gates, steps.erase)]
        chosen = np.linspace(0, len(gates[0]) - 1, min(_POINTS, len(gates[0]))).astype(int)
        *gates, erase = (x[chosen] for x in gates)
        with jax.enable_x64(True):
            values = np.asarray(analysis.eigenvalues(*gates, erase=erase))
        axes.plot(circle.real, circle.imag, color="#636363", linewidth=1.0)
        axes.axhline(0, color="#d9d9d9", linewidth=0.8, zorder=0)
        axes.axvline(0, color="#d9d9d9", linewidth=0.8, zorder=0)
        for head, color in enumerate(_colors(values.shape[1])):
            points = values[:, head].ravel()
            axes.plot(points.real, points.imag, ".", color=color, markersize=4, alpha=0.35, mew=0)
            axes.plot([], [], "o", color=color, markersize=6, label=f"head {head}")
        reach = max(reach, np.abs(values).max())
        axes.set_title(f"layer {layer}", fontsize=11)
        axes.set_aspect("equal")
    for panel, axes in enumerate(grid.flat):
        axes.set_visible(panel < len(layers))
        axes.tick_params(labelbottom=panel + columns >= len(layers))  # nothing is shown below
    grid[0, 0].set(xlim=(-1.05 * reach, 1.05 * reach), ylim=(-1.05 * reach, 1.05 * reach))
    figure.supxlabel("Re λ (factor per step)")
    figure.supylabel("Im λ (factor per step)")
    figure.suptitle("Eigenvalues of a step along its key, and the unit circle")
    _legend(figure, grid[0, 0])
    _save(figure, path)


def draw_half_lives(reports: Sequence[HeadReport], path: Path) -> None:
    """Half-lives by head and layer: of the memory, of the momentum, and along one key."""
    panels = {
        "memory_half_life": "memory, by decay α alone",
        "momentum_half_life": "momentum, by μ",
        "key_half_life": "both along a repeated key",
    }
    layers = sorted({report.layer for report in reports})
    heads = 1 + max(report.head for report in reports)
    values = np.full((len(panels), len(layers), heads), np.nan)
    for report in reports:
        for panel, name in enumerate(panels):
            values[panel, layers.index(report.layer), report.head] = getattr(report, name)
    width, height = max(3.3, 0.62 * heads + 1.2), max(2.6, 0.42 * len(layers) + 1.4)
    figure = Figure(figsize=(3 * width + 1.2, height), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True)
    shown = np.clip(values, 0.1, _LONGEST)
    norm = LogNorm(shown.min(), max(shown.max(), 1.01 * shown.min()))
    for axes, title, data, raw in zip(grid, panels.values(), shown, values, strict=True):
        image = axes.imshow(data, norm=norm, cmap="viridis", aspect="auto")
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="head", xticks=range(heads))
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        for (i, j), value in np.ndenumerate(raw):
            bright = float(norm(data[i, j])) > 0.6
            color = "black" if bright else "white"
            axes.text(j, i, short(value), ha="center", va="center", color=color, fontsize=9)
    grid[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(grid), label="half-life (tokens)")
    _save(figure, path)


def draw_gates(layers: Mapping[int, LayerSteps], path: Path) -> None:
    """Histograms of the four gates, a line a layer, a colour a head."""
    height = 1.9 if len(layers) <= 8 else 1.3
    figure = Figure(figsize=(14, height * len(layers) + 1.3), layout="constrained")
    grid = figure.subplots(len(layers), len(GATES), sharex="col", squeeze=False)
    for column, name in enumerate(GATES):
        everything = [steps.gates[column] for steps in layers.values()]
        low, high = min(x.min() for x in everything), max(x.max() for x in everything)
        room = max(0.02 * (high - low), 1e-3)
        bins = np.linspace(low - room, high + room, 61)
        for axes, layer, gates in zip(grid[:, column], layers, everything, strict=True):
            for head, color in enumerate(_colors(gates.shape[-1])):
                counts, edges = np.histogram(gates[..., head], bins)
                label = f"head {head}"
                share = counts / counts.sum()
                axes.stairs(share, edges, color=color, fill=True, alpha=0.25)
                axes.stairs(share, edges, color=color, linewidth=1.2, label=label)
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(lambda x, _: f"{100 * x:.3g} %")
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.25)
            if column == 0:
                axes.set_ylabel(f"layer {layer}\nshare of tokens", fontsize=9)
        grid[-1, column].set_xlabel(f"{_SYMBOLS[name]} (dimensionless)")
    _legend(figure, grid[0, 0])
    _save(figure, path)


def short(tokens: float) -> str:
    """A half-life in few characters."""
    if not math.isfinite(tokens):
        return "∞" if tokens > 0 else "nan"
    if tokens >= 9950:
        return f"{tokens / 1000:,.0f}k"
    return f"{tokens:.0f}" if tokens >= 9.95 else f"{tokens:.1f}"


def _colors(heads: int) -> NDArray[Any]:
    if heads <= 10:
        return np.asarray(colormaps["tab10"].colors)[:heads]  # type: ignore[attr-defined]
    colors: NDArray[Any] = colormaps["turbo"](np.linspace(0.05, 0.95, heads))
    return colors


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)


def _save(figure: Figure, path: Path) -> None:
    with new_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)
