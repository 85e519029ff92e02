"""`python -m benchmarks mqar`: associative recall as Zoology sets it, accuracy against state."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import tyro

from benchmarks.mqar import report
from benchmarks.mqar.data import (
    EXTRAPOLATED,
    MEASURED,
    TRAINED,
    VOCABULARY,
    Setting,
)
from benchmarks.mqar.group import Clock, Finished, Run, train_group
from benchmarks.mqar.model import (
    Equal,
    Shape,
    Variant,
    model_shape,
    parameter_count,
    state_entries,
)
from benchmarks.mqar.train import Recipe, Steps, draw_data
from benchmarks.records import Records, commit_of_tree, compiled_once
from mdn_jax.ops.api import Implementation


@dataclass(frozen=True)
class MqarConfig:
    """Trains models of two blocks on fixed rows, seeds and learning rates side by side.

    Runs that are in the output directory already are not made again, and one that was cut short
    goes on from its checkpoint. The table and the figure are of all runs there.
    """

    mixers: tuple[Variant, ...] = get_args(Variant)
    """What is compared; MDN as published, slow to forget at first (f below 0.4), and without output
    correction."""
    widths: tuple[int, ...] = (64, 128, 256)
    """Of the models."""
    equal: tuple[Equal, ...] = get_args(Equal)
    """Comparisons: at one width with the published shapes, or with the width of the values chosen
    so that the states are equal. Models that are in both run once."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is one initialisation and one order of the rows."""
    learning_rates: tuple[float, ...] = (1e-3, 3.2e-3, 1e-2, 3.2e-2)
    """The report shows the best one of each model, chosen on rows of their own."""
    epochs: int = 32
    """Passes over the rows, at most."""
    batch_size: int = 256
    """Rows in a step."""
    weight_decay: float = 0.1
    """Of matrices."""
    stop_at: float = 0.99
    """A run is done when its accuracy on the rows for the choice is above."""
    data_seed: int = 0
    """Of all rows."""
    side_by_side: int = 12
    """Runs of a model that train at once, at most; fewer take less memory."""
    implementation: Implementation | None = "xla"
    """Of the rules; None: the best of each, whose kernels must work under `jax.vmap`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations."""
    minutes: float | None = None
    """The command stops cleanly when these are over, and goes on when it is called again."""
    commit: str | None = None
    """What the records name; None: what git says of the working directory."""
    report: tuple[Path, ...] = ()
    """Files of records to write the table and the figure of; nothing is trained."""
    output: Path = Path("runs/mqar")
    """Directory of `results.jsonl`, `table.md`, `accuracy.png` and checkpoints (`unfinished`)."""
    smoke: bool = False
    """Whether it runs, not how well: tiny models and rows, one width, two epochs."""

    def __post_init__(self) -> None:
        for name in ("mixers", "widths", "equal", "seeds", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one, got none")
        for name in ("epochs", "batch_size", "side_by_side"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes: expected a number > 0 or None, got {self.minutes!r}")
        for width in self.widths:
            model_shape("gdn", width, "width", VOCABULARY)  # raises
        least = min(setting.rows for setting in TRAINED)
        if self.batch_size > least:
            raise ValueError(f"batch_size: expected at most {least}, got {self.batch_size!r}")


_SMOKE: dict[str, Any] = {
    "widths": (16,),
    "seeds": (0,),
    "learning_rates": (1e-3, 1e-2),
    "epochs": 2,
    "batch_size": 8,
    "implementation": "scan",
}
_SMOKE_VOCABULARY = 64


def recipe_of(config: MqarConfig) -> Recipe:
    """What is the same for all models."""
    trained, measured, extrapolated = TRAINED, MEASURED, EXTRAPOLATED
    if config.smoke:
        trained = (Setting(2, 16, 16), Setting(4, 32, 8))
        measured, extrapolated = (Setting(2, 16, 8),), (Setting(6, 32, 8),)
    return Recipe(
        trained=trained,
        measured=measured,
        extrapolated=extrapolated,
        epochs=config.epochs,
        batch_size=config.batch_size,
        weight_decay=config.weight_decay,
        stop_at=config.stop_at,
        data_seed=config.data_seed,
        implementation=config.implementation,
        dtype=config.dtype,
    )


def shapes_of(config: MqarConfig) -> list[Shape]:
    """The models, each once: small ones first, so that every mixer has results early."""
    vocabulary = _SMOKE_VOCABULARY if config.smoke else VOCABULARY
    return list(
        dict.fromkeys(
            model_shape(variant, width, equal, vocabulary)
            for width in sorted(config.widths)
            for variant in config.mixers
            for equal in config.equal
        )
    )


def mqar(config: Annotated[MqarConfig, tyro.conf.arg(name="")]) -> None:
    """Writes records as runs finish, then the table and the figure."""
    if config.report:
        print(report.write(report.read(config.report), config.output))
        return
    if config.smoke:
        config = dataclasses.replace(config, **_SMOKE)
    # the default leaves a quarter of the device unused; read when jax first asks for devices
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    clock, path = Clock(config.minutes), config.output / "results.jsonl"
    commit = config.commit or commit_of_tree(needed=not config.smoke)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, commit {commit}")
    with Records(path) as records, compiled_once(config.output):
        try:
            complete = _train(config, records, clock, commit)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise SystemExit(
                f"side_by_side: expected what fits into the memory, got {config.side_by_side} "
                "runs at once"
            ) from error
        found = records.find({"experiment": "mqar", "recipe": recipe_of(config)._asdict()})
    if found:
        print(report.write(found, config.output))
    if not complete:
        print(f"The {config.minutes:g} minutes are over; the same command goes on.")


def _train(config: MqarConfig, records: Records, clock: Clock, commit: str) -> bool:
    """Whether all is done."""
    recipe = recipe_of(config)
    data = None
    for shape in shapes_of(config):
        steps = Steps(shape, recipe)
        for runs in _groups(config):
            setting = _setting(shape, recipe)
            missing = [run for run in runs if not records.find(setting | run._asdict())]
            if not missing:
                continue
            if not clock.allows(0):
                return False
            if data is None:
                data = jax.device_put(draw_data(recipe, shape.vocabulary))
            about = _about(shape, recipe, commit) | {"side_by_side": len(runs)}

            def finished(
                done: Finished, setting: dict[str, Any] = setting, about: dict[str, Any] = about
            ) -> None:
                _add(records, setting, about, recipe, done)

            complete = train_group(
                steps,
                recipe,
                data,
                missing,
                checkpoint=config.output / "unfinished" / f"{_digest(setting, runs)}.npz",
                clock=clock,
                finished=finished,
            )
            if not complete:
                return False
    return True


def _groups(config: MqarConfig) -> Iterator[list[Run]]:
    """The runs of one model, as many at once as may be; all rates of a seed before the next."""
    runs = [Run(seed, rate) for seed in config.seeds for rate in config.learning_rates]
    for begin in range(0, len(runs), config.side_by_side):
        yield runs[begin : begin + config.side_by_side]


def _setting(shape: Shape, recipe: Recipe) -> dict[str, Any]:
    """What a record is found by, besides seed and learning rate."""
    return {"experiment": "mqar", **shape._asdict(), "recipe": recipe._asdict()}


def _digest(setting: dict[str, Any], runs: list[Run]) -> str:
    """Of a group, for the name of its checkpoint."""
    return hashlib.sha256(json.dumps([setting, runs]).encode()).hexdigest()[:16]


def _about(shape: Shape, recipe: Recipe, commit: str) -> dict[str, Any]:
    """What a record says besides; the states of the longest rows."""
    lengths = (
        max(setting.length for setting in settings)
        for settings in (recipe.trained, recipe.extrapolated)
    )
    trained, extrapolated = (state_entries(shape, length) for length in lengths)
    return {
        "parameters": parameter_count(shape),
        "state_trained": trained,
        "state_extrapolated": extrapolated,
        "commit": commit,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _add(
    records: Records,
    setting: dict[str, Any],
    about: dict[str, Any],
    recipe: Recipe,
    done: Finished,
) -> None:
    """The record of a run, once: a checkpoint may be older than it."""
    if records.find(setting | done.run._asdict()):
        return
    names = [one.name for one in (*recipe.measured, *recipe.extrapolated)]
    count = len(recipe.measured)
    test = dict(zip(names, done.test, strict=True))
    records.add(
        {
            **setting,
            **done.run._asdict(),
            "trained": {name: test[name] for name in names[:count]},
            "extrapolated": {name: test[name] for name in names[count:]},
            "choice": dict(zip(names, done.choice, strict=True)),
            "epochs": done.epochs,
            "end": done.end,
            "curve": done.curve,
            "minutes": done.minutes,
            **about,
        }
    )
    accuracies = " ".join(f"{name} {100 * x:.1f}" for name, x in test.items())
    print(
        f"{report.NAMES[setting['variant']]:24} width {setting['width']:3} "
        f"({setting['value_width']:g}) seed {done.run.seed} rate {done.run.learning_rate:g} "
        f"epochs {done.epochs} ({done.end}): {accuracies}",
        flush=True,
    )
