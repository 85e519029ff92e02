"""The figure of `python -m benchmarks numerics`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.numerics_errors import Errors

_LOOKS = {
    "closed form": ("#d94801", "o", "published closed form"),
    "mdn_jax": ("#2171b5", "x", "mdn_jax"),
}
_OVERFLOW = 88.7  # log of the largest float32


def draw(rows: Sequence[Errors], path: Path) -> None:
    """Error of every head's outputs against the nats by which its momentum decays faster.

    Args:
      rows: of `benchmarks.numerics.measure`.
      path: PNG file to write.
    """
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    figure = Figure(figsize=(5.6 * len(dtypes) + 0.6, 5.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    errors = np.concatenate([row.errors["o"] for row in rows])
    top = 10.0 ** np.ceil(np.log10(np.nanmax(errors)) + 0.5)
    for axes, dtype in zip(grid, dtypes, strict=True):
        for form, (color, marker, label) in _LOOKS.items():
            chosen = [row for row in rows if (row.dtype, row.form) == (dtype, form)]
            nats = np.concatenate([row.nats for row in chosen])
            error = np.concatenate([row.errors["o"] for row in chosen])
            lost = ~np.isfinite(error)
            error = np.where(lost, 3 * top, error)
            points = {"marker": marker, "linestyle": "", "markersize": 4, "alpha": 0.45}
            axes.plot(nats, error, color=color, label=label, **points)
        axes.axhline(top, color="#969696", linewidth=0.8)
        axes.text(0.015, 3 * top, "nan", transform=axes.get_yaxis_transform(), va="center")
        axes.axvline(_OVERFLOW, color="#969696", linewidth=0.8, linestyle=":")
        axes.set_xscale("symlog", linthresh=1.0, linscale=0.4)
        axes.set_yscale("log")
        axes.set_ylim(1e-8, 9 * top)
        axes.set(
            title=f"q, k, v in {dtype}",
            xlabel="Σ (log α − log μ) over a chunk of 64 steps (nats)",
        )
        axes.grid(alpha=0.25)
        axes.tick_params(axis="x", labelsize=9)
    grid[0].set_ylabel("relative error of a head's outputs\nagainst the float64 recurrence")
    style = {"rotation": 90, "ha": "right", "va": "center", "color": "#636363", "fontsize": 9}
    grid[0].text(_OVERFLOW * 0.93, 1e-4, "exp overflows in float32", **style)
    grid[0].legend(loc="upper left", bbox_to_anchor=(0.02, 0.86))
    temporary = path.with_suffix(".tmp")
    canvas.print_png(temporary)
    temporary.replace(path)
