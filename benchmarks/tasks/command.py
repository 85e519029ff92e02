"""`mdn-bench tasks`: trains and scores mixers on generated tasks."""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import tyro

from benchmarks.equal_models import Equal, model_config, model_size
from benchmarks.tasks.report import Result, draw, table
from benchmarks.tasks.retrieval import Copying, Induction, Needle, Recall
from benchmarks.tasks.task import Task
from benchmarks.tasks.tracking import Tracking
from benchmarks.tasks.train import Recipe, train_task
from mdn_jax.models import Mixer
from mdn_jax.ops.api import Implementation

TaskName = Literal["recall", "copying", "induction", "parity", "s5", "needle"]


@dataclass(frozen=True)
class TasksConfig:
    """Trains every mixer on every setting of every task, all seeds and learning rates at once."""

    tasks: tuple[TaskName, ...] = get_args(TaskName)
    """Associative recall, selective copying, induction, parity, S5, passkey retrieval."""
    mixers: tuple[Mixer, ...] = get_args(Mixer)
    """What is compared."""
    equal: Equal = "state"
    """What the models have alike; the number of parameters is always within the MLP's rounding."""
    recall_pairs: tuple[int, ...] = (8, 16, 32, 64)
    """Pairs of `recall`."""
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


_SMOKE: dict[str, Any] = {
    "recall_pairs": (2,),
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


def settings(config: TasksConfig) -> dict[TaskName, dict[int, Task]]:
    """The tasks to run: of every name, by the knob that the figure shows."""
    make: dict[TaskName, tuple[tuple[int, ...], Callable[[int], Task]]] = {
        "recall": (
            config.recall_pairs,
            lambda n: Recall(pairs=n, gap=config.recall_gap, keys=config.recall_keys),
        ),
        "copying": (
            config.copying_counts,
            lambda n: Copying(count=n, noise_length=config.copying_length),
        ),
        "induction": (config.induction_lengths, lambda n: Induction(length=n)),
        "parity": (config.parity_lengths, lambda n: Tracking(group="z2", length=n)),
        "s5": (config.s5_lengths, lambda n: Tracking(group="s5", length=n)),
        "needle": (config.needle_lengths, lambda n: Needle(length=n)),
    }
    return {name: {n: make[name][1](n) for n in make[name][0]} for name in config.tasks}


def tasks(config: Annotated[TasksConfig, tyro.conf.arg(name="")]) -> None:
    """Writes results as they come, then the table and the figure."""
    if config.smoke:
        config = dataclasses.replace(config, **_SMOKE)
    try:
        chosen = settings(config)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    device = jax.devices()[0].device_kind
    config.output.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        steps=config.steps,
        batch_size=config.batch_size,
        weight_decay=config.weight_decay,
        points=config.points,
        test_rows=config.test_rows,
        implementation=config.implementation,
        dtype=config.dtype,
    )
    print(f"{device}, jax {jax.__version__}; equal {config.equal}, {config.steps} steps")
    results: list[Result] = []
    with (config.output / "results.jsonl").open("w") as file:
        for name, by_knob in chosen.items():
            for knob, task in by_knob.items():
                # small: every task with one mixer, every mixer on one task
                few = config.smoke and name != config.tasks[0]
                for mixer in config.mixers[:1] if few else config.mixers:
                    result = _run(config, recipe, name, knob, task, mixer)
                    results.append(result)
                    for record in result.records(device):
                        file.write(json.dumps(record) + "\n")
                    file.flush()
                    print(result.line(), flush=True)
    text = table(results)
    (config.output / "table.md").write_text(text + "\n")
    draw(results, config.output / "accuracy.png")
    print(text)


def _run(
    config: TasksConfig, recipe: Recipe, name: TaskName, knob: int, task: Task, mixer: Mixer
) -> Result:
    model = model_config(
        mixer,
        vocab_size=task.vocab_size,
        hidden_size=config.hidden_size,
        layers=config.layers,
        heads=config.heads,
        equal=config.equal,
    )
    began = time.perf_counter()
    scores = train_task(
        task, model, recipe, seeds=config.seeds, learning_rates=config.learning_rates
    )
    return Result(
        task=name,
        knob=knob,
        setting=dataclasses.asdict(task),  # type: ignore[call-overload]
        mixer=mixer,
        size=model_size(model),
        recipe=recipe,
        scores=scores,
        seconds=time.perf_counter() - began,
    )
