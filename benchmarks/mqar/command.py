"""`python -m benchmarks mqar`: associative recall as Zoology sets it, accuracy against state."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import jax
import tyro

from benchmarks.experiment import ExperimentConfig, run_experiment
from benchmarks.mqar import report
from benchmarks.mqar.data import (
    EXTRAPOLATED,
    MEASURED,
    TRAINED,
    VOCABULARY,
    Setting,
)
from benchmarks.mqar.group import Finished, train_group
from benchmarks.mqar.model import (
    Equal,
    Shape,
    Variant,
    model_shape,
    parameter_count,
    state_entries,
)
from benchmarks.mqar.train import Recipe, Steps, draw_data
from benchmarks.records import Records
from benchmarks.runs import Clock, checkpoint_name, groups


@dataclass(frozen=True)
class MqarConfig(ExperimentConfig):
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
    learning_rates: tuple[float, ...] = (1e-3, 3.2e-3, 1e-2, 3.2e-2)
    epochs: int = 32
    """Passes over the rows, at most."""
    batch_size: int = 256
    """Rows in a step."""
    stop_at: float = 0.99
    """A run is done when its accuracy on the rows for the choice is above."""
    data_seed: int = 0
    """Of all rows."""
    side_by_side: int = 12
    output: Path = Path("runs/mqar")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_some("mixers", "widths", "equal")
        self.check_positive("epochs", "batch_size")
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
    """Associative recall as Zoology sets it: records as runs finish, then the table and figure."""
    if config.smoke:
        config = dataclasses.replace(config, **_SMOKE)
    train = partial(_train, config)
    recipe = recipe_of(config)._asdict()
    run_experiment("mqar", config, recipe=recipe, train=train, write=report.write)


def _train(config: MqarConfig, records: Records, clock: Clock, commit: str) -> bool:
    """Whether all is done."""
    recipe = recipe_of(config)
    data = None
    for shape in shapes_of(config):
        steps = Steps(shape, recipe)
        for runs in groups(config.seeds, config.learning_rates, config.side_by_side):
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
                checkpoint=config.output / "unfinished" / checkpoint_name(setting, runs),
                clock=clock,
                finished=finished,
            )
            if not complete:
                return False
    return True


def _setting(shape: Shape, recipe: Recipe) -> dict[str, Any]:
    """What a record is found by, besides seed and learning rate."""
    return {"experiment": "mqar", **shape._asdict(), "recipe": recipe._asdict()}


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
