"""`python -m benchmarks tasks`: trains and scores mixers on generated tasks."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import tyro

from benchmarks.equal_models import Equal, model_config, model_size
from benchmarks.initial_factors import PUBLISHED_FACTOR
from benchmarks.records import Records
from benchmarks.tasks.report import Result, draw, table
from benchmarks.tasks.retrieval import Copying, Induction, Needle, Recall
from benchmarks.tasks.task import Task
from benchmarks.tasks.tracking import Tracking
from benchmarks.tasks.train import Recipe, Score, train_task
from mdn_jax.models import Mixer
from mdn_jax.ops.api import Implementation

TaskName = Literal["recall", "copying", "induction", "parity", "s5", "needle"]


@dataclass(frozen=True)
class TasksConfig:
    """Trains every mixer on every task, all seeds and learning rates at once.

    Results that are in the output directory already are not measured again.
    """

    tasks: tuple[TaskName, ...] = get_args(TaskName)
    """Associative recall, selective copying, induction, parity, S5, passkey retrieval."""
    mixers: tuple[Mixer, ...] = get_args(Mixer)
    """What is compared."""
    equal: Equal = "state"
    """What the models have alike; the number of parameters is always within the MLP's rounding."""
    recall_pairs: tuple[int, ...] = (8, 16, 32, 64)
    """Pairs of `recall`: one training on all, scored at each."""
    recall_gap: int = 64
    """Tokens of noise between pairs and questions of `recall`."""
    recall_keys: int = 256
    """Different keys, and values, of `recall`."""
    copying_counts: tuple[int, ...] = (8, 16, 32)
    """Tokens to copy of `copying`."""
    copying_length: int = 256
    """Length of the noise of `copying`."""
    induction_lengths: tuple[int, ...] = (64, 256, 1024)
    """Tokens of `induction`."""
    parity_lengths: tuple[int, ...] = (16, 64, 256)
    """Bits of `parity`."""
    s5_lengths: tuple[int, ...] = (8, 16, 32)
    """Permutations of `s5`."""
    needle_lengths: tuple[int, ...] = (1024, 4096)
    """Bytes of `needle`."""
    hidden_size: int = 64
    """Width of the models."""
    layers: int = 2
    """Layers of the models."""
    heads: int = 4
    """Key heads of the models; the width of a key head is `hidden_size / heads`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of parameters and data."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Peaks; the table shows the best one of each model, chosen on rows of their own."""
    steps: int = 4000
    """Optimizer steps."""
    batch_size: int = 64
    """Rows in a step."""
    largest_factor: float = PUBLISHED_FACTOR
    """MDN starts with `theta = arctan(eta f)`, f uniform up to this; a small one remembers long."""
    weight_decay: float = 0.1
    """Of matrices."""
    points: int = 20
    """Measurements of the training curve."""
    test_rows: int = 4096
    """Rows that the accuracy is measured on."""
    implementation: Implementation | None = "xla"
    """Of the rules; None: the best of each, whose kernels must work under `jax.vmap`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations."""
    output: Path = Path("runs/tasks")
    """Directory of `results.jsonl`, `table.md` and `accuracy.png`."""
    smoke: bool = False
    """Whether it runs, not how well: tiny models, few steps; all mixers on the first task only."""

    def __post_init__(self) -> None:
        for name in ("tasks", "mixers", "seeds", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one, got none")
        for name in ("steps", "batch_size", "points", "test_rows", "layers", "heads"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
        if not self.largest_factor > 0:
            raise ValueError(f"largest_factor: expected a number > 0, got {self.largest_factor!r}")


_SMOKE: dict[str, Any] = {
    "recall_pairs": (2, 4),
    "recall_gap": 2,
    "recall_keys": 8,
    "copying_counts": (2,),
    "copying_length": 8,
    "induction_lengths": (8,),
    "parity_lengths": (8,),
    "s5_lengths": (8,),
    "needle_lengths": (96,),
    "hidden_size": 16,
    "layers": 1,
    "heads": 2,
    "seeds": (0, 1),
    "learning_rates": (1e-2,),
    "steps": 20,
    "batch_size": 8,
    "points": 2,
    "test_rows": 16,
    "implementation": "scan",
}


def settings(config: TasksConfig) -> list[tuple[TaskName, Task]]:
    """The tasks to train on, each by itself."""
    make: dict[TaskName, Callable[[], list[Task]]] = {
        "recall": lambda: [
            Recall(pairs=config.recall_pairs, gap=config.recall_gap, keys=config.recall_keys)
        ],
        "copying": lambda: [
            Copying(count=n, noise_length=config.copying_length) for n in config.copying_counts
        ],
        "induction": lambda: [Induction(length=n) for n in config.induction_lengths],
        "parity": lambda: [Tracking(group="z2", length=n) for n in config.parity_lengths],
        "s5": lambda: [Tracking(group="s5", length=n) for n in config.s5_lengths],
        "needle": lambda: [Needle(length=n) for n in config.needle_lengths],
    }
    return [(name, task) for name in config.tasks for task in make[name]()]


def tasks(config: Annotated[TasksConfig, tyro.conf.arg(name="")]) -> None:
    """Small tasks, all mixers: results as they come, then the table and the figure."""
    if config.smoke:
        config = dataclasses.replace(config, **_SMOKE)
    try:
        chosen = settings(config)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; equal {config.equal}")
    results: list[Result] = []
    with Records(config.output / "results.jsonl") as records:
        for name, task in chosen:
            # small: every task with one mixer, every mixer on one task
            few = config.smoke and name != config.tasks[0]
            for mixer in config.mixers[:1] if few else config.mixers:
                for result in _run(config, records, name, task, mixer):
                    results.append(result)
                    print(result.line(), flush=True)
    text = table(results)
    (config.output / "table.md").write_text(text + "\n")
    draw(results, config.output / "accuracy.png")
    print(text)


def _run(
    config: TasksConfig, records: Records, name: TaskName, task: Task, mixer: Mixer
) -> list[Result]:
    """A result a level, from the records where they are complete."""
    recipe = Recipe(
        steps=config.steps,
        batch_size=config.batch_size,
        weight_decay=config.weight_decay,
        points=config.points,
        test_rows=config.test_rows,
        implementation=config.implementation,
        dtype=config.dtype,
        largest_factor=config.largest_factor,
    )
    model = model_config(
        mixer,
        vocab_size=task.vocab_size,
        hidden_size=config.hidden_size,
        layers=config.layers,
        heads=config.heads,
        equal=config.equal,
    )
    size = model_size(model)
    setting = {
        "task": name,
        "setting": dataclasses.asdict(task),  # type: ignore[call-overload]
        "mixer": mixer,
        "model": model.to_dict(),
        **recipe._asdict(),
    }
    scores = _recorded(config, records, setting, task.levels)
    if scores is None:
        began = time.perf_counter()
        scores = train_task(
            task, model, recipe, seeds=config.seeds, learning_rates=config.learning_rates
        )
        about = {
            **size._asdict(),
            "device": jax.devices()[0].device_kind,
            "seconds_of_all": time.perf_counter() - began,
        }
        for score in scores:
            records.add({**setting, **score._asdict(), **about})
    return [Result(name, level, mixer, size, scores) for level in task.levels]


def _recorded(
    config: TasksConfig, records: Records, setting: dict[str, Any], levels: Sequence[int]
) -> list[Score] | None:
    """Scores of every level, seed and learning rate; None if one is missing."""
    scores = []
    for level in levels:
        for seed in config.seeds:
            for rate in config.learning_rates:
                own = {"level": level, "seed": seed, "learning_rate": rate}
                found = records.find(setting | own)
                if not found:
                    return None
                scores.append(Score(**{field: found[-1][field] for field in Score._fields}))
    return scores
