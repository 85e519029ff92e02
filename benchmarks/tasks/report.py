"""Results of `python -m benchmarks tasks`: a table, a figure."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.equal_models import SHOWN, Size
from benchmarks.tasks.train import Score
from mdn_jax.models import Mixer


@dataclasses.dataclass(frozen=True)
class Result:
    """A mixer on one level of a task.

    Attributes:
      task: its name.
      level: the number that the figure has on its axis.
      mixer: of the model.
      size: of the model.
      scores: of the training, every level, seed and learning rate.
    """

    task: str
    level: int
    mixer: Mixer
    size: Size
    scores: list[Score]

    @property
    def best(self) -> list[Score]:
        """The level's seeds at the learning rate that is best by mean accuracy on other rows.

        One rate for all levels that were trained on together.
        """
        rates = sorted({score.learning_rate for score in self.scores})

        def choice(rate: float) -> float:
            return statistics.fmean(s.choice for s in self.scores if s.learning_rate == rate)

        best = self.level, max(rates, key=choice)
        return [score for score in self.scores if (score.level, score.learning_rate) == best]

    @property
    def accuracies(self) -> list[float]:
        """Of the seeds at the best learning rate."""
        return [score.accuracy for score in self.best]

    def line(self) -> str:
        """Of progress."""
        name = f"{self.task} {self.level}"
        return (
            f"{name:16} {SHOWN[self.mixer]:12} accuracy {_spread(self.accuracies)} at "
            f"{self.best[0].learning_rate:g}; {self.size.parameters:,} parameters"
        )


def _spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.fmean(values):.1f} ± {100 * deviation:.1f}"


def table(results: Sequence[Result]) -> str:
    """Accuracy in percent, mean and standard deviation over seeds: a row a mixer and size."""
    columns = list(dict.fromkeys((r.task, r.level) for r in results))
    mixers = list(dict.fromkeys(r.mixer for r in results))
    cells = {(r.mixer, r.task, r.level): _spread(r.accuracies) for r in results}
    lines = []
    for mixer in mixers:
        sizes = [r.size for r in results if r.mixer == mixer]
        states = sizes[0].state
        lines.append(
            [
                SHOWN[mixer],
                f"{max(size.parameters for size in sizes):,}",
                "grows" if states is None else f"{states:,}",
                *(cells.get((mixer, *column), "-") for column in columns),
            ]
        )
    headers = ["", "parameters", "state", *(f"{task} {level}" for task, level in columns)]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def draw(results: Sequence[Result], path: Path) -> None:
    """Accuracy against the level, a panel a task and a line a mixer; bars: least and most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r.task for r in results))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.6 * columns + 1.2, 3.6 * rows), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    axis = {"recall": "pairs", "copying": "tokens to copy", "needle": "bytes"}
    mixers = list(dict.fromkeys(r.mixer for r in results))
    handles: dict[str, Any] = {}
    for panel, name in zip(panels, names, strict=False):
        for i, mixer in enumerate(mixers):
            own = [r for r in results if (r.task, r.mixer) == (name, mixer)]
            if not own:
                continue
            means = [statistics.fmean(r.accuracies) for r in own]
            low = [m - min(r.accuracies) for m, r in zip(means, own, strict=True)]
            high = [max(r.accuracies) - m for m, r in zip(means, own, strict=True)]
            handles[SHOWN[mixer]] = panel.errorbar(
                [r.level for r in own],
                means,
                yerr=[low, high],
                color=f"C{i}",
                marker="osD^vP"[i % 6],
                linestyle="--" if mixer == "attention" else "-",
                markersize=5,
                capsize=3,
            )
        levels = sorted({r.level for r in results if r.task == name})
        panel.set_xscale("log", base=2)
        panel.set_xticks(levels, [str(level) for level in levels])
        panel.minorticks_off()
        panel.set(title=name, xlabel=axis.get(name, "length"))
        panel.set(ylabel="accuracy", ylim=(-0.03, 1.03))
        panel.grid(alpha=0.3)
    for panel in list(figure.axes)[len(names) :]:
        panel.remove()
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    temporary = path.with_suffix(".tmp")
    canvas.print_png(temporary)
    temporary.replace(path)
