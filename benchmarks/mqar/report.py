"""Table and figure of `python -m benchmarks mqar`, from its records alone."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from benchmarks.equal_models import SHOWN
from benchmarks.records import read_records
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


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The records of all files.

    Raises:
      SystemExit: a file that is not there, or of something else, or records of several recipes.
    """
    records: list[dict[str, Any]] = []
    for path in paths:
        if not path.is_file():
            raise SystemExit(f"report: expected files of records, got {path}, which is not there")
        lines = read_records(path)
        records += [record for record in lines if record.get("experiment") == "mqar"]
    if not records:
        raise SystemExit(f"report: expected records of mqar, got none in {len(paths)} files")
    recipes = [r["recipe"] for r in records]
    for other in recipes:
        if other != recipes[0]:
            name = next(n for n in other if other[n] != recipes[0].get(n))
            raise SystemExit(
                f"report: expected records of one recipe, got {name} = {recipes[0].get(name)!r} "
                f"and {other[name]!r}"
            )
    return records


def models(records: Sequence[Mapping[str, Any]]) -> list[Model]:
    """Groups the records; of a run that was made twice the last record counts."""
    groups: dict[tuple[Any, ...], dict[tuple[float, int], Mapping[str, Any]]] = {}
    for record in records:
        key = tuple(record[name] for name in ("variant", "width", "value_width"))
        groups.setdefault(key, {})[record["learning_rate"], record["seed"]] = record
    order = list(STYLES)
    keys = sorted(groups, key=lambda key: (order.index(key[0]), *key[1:]))
    return [_best(groups[key]) for key in keys]


def _best(runs: Mapping[tuple[float, int], Mapping[str, Any]]) -> Model:
    rates: dict[float, list[Mapping[str, Any]]] = {}
    for (rate, _), record in sorted(runs.items()):
        rates.setdefault(rate, []).append(record)
    most = max(map(len, rates.values()))
    complete = [rate for rate in rates if len(rates[rate]) == most]  # seeds that are not there yet

    def choice(rate: float) -> float:
        return statistics.fmean(x for r in rates[rate] for x in r["choice"].values())

    best = max(complete, key=choice)
    own, first = rates[best], rates[best][0]

    def accuracies(part: str) -> dict[str, list[float]]:
        return {name: [record[part][name] for record in own] for name in first[part]}

    return Model(
        variant=first["variant"],
        width=first["width"],
        value_width=first["value_width"],
        parameters=first["parameters"],
        states=(first["state_trained"], first["state_extrapolated"]),
        learning_rate=best,
        rates=len(rates),
        trained=accuracies("trained"),
        extrapolated=accuracies("extrapolated"),
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
                *(_spread(accuracies[name]) for name in settings),
            ]
        )
    names = (*chosen[0].trained, *(f"{name} (extrapolated)" for name in chosen[0].extrapolated))
    headers = ["", "width (values)", "parameters", "state", "rate", "seeds", *names]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{100 * values[0]:.1f}"
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


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


def _short(commit: str) -> str:
    name, *changed = commit.split("-")
    return "-".join([name[:12], *changed])


def write(records: Sequence[Mapping[str, Any]], directory: Path) -> str:
    """Writes `table.md` and `accuracy.png`; returns the table."""
    chosen = models(records)
    about = sorted({(r["device"], r["commit"]) for r in records})
    # a group's minutes, shared by those that ran side by side
    minutes = sum(r["minutes"] / r["side_by_side"] for r in records)
    lines = [
        table(chosen),
        "",
        f"{len(records)} runs, {math.ceil(minutes):,} device minutes; "
        + "; ".join(f"{device}, commit {_short(commit)}" for device, commit in about)
        + ".",
    ]
    text = "\n".join(lines)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "table.md").write_text(text + "\n")
    draw(chosen, directory / "accuracy.png")
    return text
