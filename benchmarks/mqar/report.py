"""Table and figure of `python -m benchmarks mqar`, from its records alone."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from benchmarks.equal_models import SHOWN
from benchmarks.run_reports import Record, best, provenance, spread
from benchmarks.style import STYLES
from mdn_jax.new_file import new_file

NAMES: Mapping[str, str] = {
    **{str(mixer): name for mixer, name in SHOWN.items()},
    "mdn_slow": "MDN, slow to forget",
    "mdn_uncorrected": "MDN, no correction",
    "mdn_slow_uncorrected": "MDN, slow, no correction",
}
"""Of the variants, in tables."""


class Model(NamedTuple):
    """The runs of one model at its best learning rate.

    Attributes:
      variant: its mixer.
      width: of the residual stream.
      value_width: of the values, over `width`.
      parameters: number of them.
      states: entries of the state in the longest rows of the training, and of the extrapolation.
      learning_rate: the best one, by mean choice accuracy of all seeds and settings.
      rates: learning rates that were tried.
      trained: accuracy for each setting, one a seed.
      extrapolated: the same with more pairs than in the training.
    """

    variant: str
    width: int
    value_width: float
    parameters: int
    states: tuple[int, int]
    learning_rate: float
    rates: int
    trained: Mapping[str, list[float]]
    extrapolated: Mapping[str, list[float]]


def models(records: Sequence[Mapping[str, Any]]) -> list[Model]:
    """Groups the records; of a run that was made twice the last record counts."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        key = tuple(record[name] for name in ("variant", "width", "value_width"))
        groups.setdefault(key, []).append(record)
    order = list(STYLES)
    keys = sorted(groups, key=lambda key: (order.index(key[0]), *key[1:]))
    return [_best(groups[key]) for key in keys]


def _best(records: Sequence[Record]) -> Model:
    chosen = best(records)
    first = chosen.records[0]
    return Model(
        variant=first["variant"],
        width=first["width"],
        value_width=first["value_width"],
        parameters=first["parameters"],
        states=(first["state_trained"], first["state_extrapolated"]),
        learning_rate=chosen.learning_rate,
        rates=chosen.rates,
        trained=chosen.accuracies("trained"),
        extrapolated=chosen.accuracies("extrapolated"),
    )


def table(chosen: Sequence[Model]) -> str:
    """Accuracy in percent, mean ± standard deviation over seeds: a row a model."""
    settings = [*chosen[0].trained, *chosen[0].extrapolated]
    lines = []
    for model in chosen:
        accuracies = {**model.trained, **model.extrapolated}
        seeds = len(next(iter(accuracies.values())))
        lines.append(
            [
                NAMES[model.variant],
                f"{model.width} ({model.value_width:g})",
                f"{model.parameters:,}",
                f"{model.states[0]:,}",
                f"{model.learning_rate:g} of {model.rates}",
                seeds,
                *(spread(accuracies[name]) for name in settings),
            ]
        )
    names = (*chosen[0].trained, *(f"{name} (extrapolated)" for name in chosen[0].extrapolated))
    headers = ["", "width (values)", "parameters", "state", "rate", "seeds", *names]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def draw(chosen: Sequence[Model], path: Path) -> None:
    """Mean accuracy of the settings against the state, trained and extrapolated.

    A point is a seed; a line joins the widths of a mixer. Hollow points and dotted lines are of
    values that are not as wide as published, so that states are equal.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 4.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    handles: dict[str, Any] = {}
    kinds = list(dict.fromkeys((model.variant, model.value_width) for model in chosen))
    for i, (panel, part) in enumerate(zip(panels, ("trained", "extrapolated"), strict=True)):
        for variant, values in kinds:
            own = [m for m in chosen if (m.variant, m.value_width) == (variant, values)]
            own.sort(key=lambda model: model.states[i])
            seeds = [_means(getattr(model, part)) for model in own]
            states = [model.states[i] for model in own]
            published = values == (1 if variant in ("attention", "kda") else 2)
            colour, marker = STYLES[variant]
            style: dict[str, Any] = {
                "color": colour,
                "marker": marker,
                "markersize": 5,
                "markerfacecolor": colour if published else "none",
            }
            x = [state for state, means in zip(states, seeds, strict=True) for _ in means]
            panel.plot(x, [mean for means in seeds for mean in means], linestyle="", **style)
            line = "--" if variant == "attention" else "-" if published else ":"
            means = [statistics.fmean(means) for means in seeds]
            panel.plot(states, means, linestyle=line, color=colour, linewidth=1.5)
            label = NAMES[variant] + ("" if published else ", equal state")
            (handles[label],) = panel.plot([], [], linestyle=line, **style)
        pairs = ", ".join(name.split("/")[0] for name in getattr(chosen[0], part))
        panel.set_xscale("log", base=2)
        panel.set(title=f"{part}: {pairs} pairs", xlabel="state of the mixer, numbers")
        panel.set_ylim(-0.03, 1.03)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy, mean of the settings")
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    with new_file(path) as temporary:
        canvas.print_png(temporary)


def _means(accuracies: Mapping[str, Sequence[float]]) -> list[float]:
    """Of each seed, over the settings."""
    return [statistics.fmean(seed) for seed in zip(*accuracies.values(), strict=True)]


def write(records: Sequence[Mapping[str, Any]], directory: Path) -> str:
    """Writes `table.md` and `accuracy.png`; returns the table."""
    chosen = models(records)
    text = "\n".join([table(chosen), "", provenance(records)])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "table.md").write_text(text + "\n")
    draw(chosen, directory / "accuracy.png")
    return text
