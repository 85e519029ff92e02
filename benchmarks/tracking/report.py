"""Table and figure of `python -m benchmarks tracking`, from its records alone."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from benchmarks.run_reports import Record, best, provenance, spread
from benchmarks.style import STYLES
from benchmarks.tracking.variants import NAMES
from mdn_jax.new_file import new_file

SHOWN: Mapping[str, str] = {"parity": "parity", "mod3": "modulo 3", "mod5": "modulo 5", "s5": "S5"}
"""Names of the tasks."""


class Model(NamedTuple):
    """The runs of one variant on one task at its best learning rate.

    Attributes:
      task: which.
      variant: which.
      parameters: number of them.
      state: numbers that a row needs to go on, without convolutions.
      chance: accuracy of a guess.
      trained: length of the rows of the training.
      learning_rate: the best one, by mean choice accuracy of all seeds and lengths.
      rates: learning rates that were tried.
      accuracies: by length, one a seed.
    """

    task: str
    variant: str
    parameters: int
    state: int
    chance: float
    trained: int
    learning_rate: float
    rates: int
    accuracies: Mapping[int, list[float]]


def models(records: Sequence[Record]) -> list[Model]:
    """Groups the records, in the order of tables."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["task"], record["variant"]), []).append(record)
    order = [(task, variant) for task in SHOWN for variant in NAMES]
    return [_model(groups[key]) for key in order if key in groups]


def _model(records: Sequence[Record]) -> Model:
    chosen = best(records)
    first = chosen.records[0]
    return Model(
        task=first["task"],
        variant=first["variant"],
        parameters=first["parameters"],
        state=first["state"],
        chance=first["chance"],
        trained=first["recipe"]["trained"],
        learning_rate=chosen.learning_rate,
        rates=chosen.rates,
        accuracies={int(length): x for length, x in chosen.accuracies("test").items()},
    )


def table(chosen: Sequence[Model]) -> str:
    """Accuracy in percent, mean ± standard deviation over seeds: a row a task and variant."""
    lengths = sorted(chosen[0].accuracies)
    lines = [
        [
            SHOWN[model.task],
            NAMES[model.variant],
            f"{model.parameters:,}",
            f"{model.state:,}",
            f"{model.learning_rate:g} of {model.rates}",
            len(model.accuracies[lengths[0]]),
            f"{100 * model.chance:.1f}",
            *(spread(model.accuracies[length]) for length in lengths),
        ]
        for model in chosen
    ]
    stretches = [f"{begin + 1}-{end}" for begin, end in zip([0, *lengths], lengths, strict=False)]
    headers = ["task", "", "parameters", "state", "rate", "seeds", "chance", *stretches]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def draw(chosen: Sequence[Model], path: Path) -> None:
    """Accuracy against length, a panel a task; a point is a seed, a line joins the means.

    Dotted: chance. Dashed: the length of the training's rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(model.task for model in chosen))
    figure = Figure(figsize=(3.2 * len(tasks) + 3.2, 3.8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    variants = [variant for variant in NAMES if any(m.variant == variant for m in chosen)]
    for panel, task in zip(panels, tasks, strict=True):
        own = [model for model in chosen if model.task == task]
        lengths = sorted(own[0].accuracies)
        panel.axhline(own[0].chance, color="gray", linestyle=":", linewidth=1)
        panel.axvline(own[0].trained, color="gray", linestyle="--", linewidth=1)
        for model in own:
            colour, marker = STYLES[model.variant]
            # side by side, so that points of several variants do not hide each other
            shift = 1.03 ** (variants.index(model.variant) - (len(variants) - 1) / 2)
            x = [length * shift for length in lengths]
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4}
            for seed in zip(*(model.accuracies[length] for length in lengths), strict=True):
                panel.plot(x, seed, linestyle="", alpha=0.7, **style)
            means = [statistics.fmean(model.accuracies[length]) for length in lengths]
            panel.plot(x, means, color=colour, linewidth=1.5)
            handles.setdefault(model.variant, panel.plot([], [], linestyle="-", **style)[0])
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [str(length) for length in lengths])
        panel.minorticks_off()
        panel.set(title=SHOWN[task], xlabel="tokens read", ylim=(-0.03, 1.03))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy")
    figure.legend(
        [handles[variant] for variant in variants],
        [_label(variant, chosen) for variant in variants],
        loc="outside right upper",
    )
    with new_file(path) as temporary:
        canvas.print_png(temporary)


def _label(variant: str, chosen: Sequence[Model]) -> str:
    """With state and parameters, which the vocabulary of a task is part of."""
    own = [model for model in chosen if model.variant == variant]
    counts = [model.parameters for model in own]
    thousands = dict.fromkeys(f"{count / 1000:.0f}k" for count in (min(counts), max(counts)))
    return f"{NAMES[variant]}\n  state {own[0].state:,}, {' to '.join(thousands)} parameters"


def write(records: Sequence[Record], directory: Path) -> str:
    """Writes `table.md` and `accuracy.png`; returns the table."""
    chosen = models(records)
    text = "\n".join([table(chosen), "", provenance(records)])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "table.md").write_text(text + "\n")
    draw(chosen, directory / "accuracy.png")
    return text
