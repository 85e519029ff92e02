"""`python -m benchmarks tracking`: state tracking, learned on short rows, tested on long ones."""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import tyro

from benchmarks.equal_models import model_size
from benchmarks.experiment import ExperimentConfig, run_experiment
from benchmarks.records import Records
from benchmarks.runs import Clock, checkpoint_name, groups
from benchmarks.tasks.tracking import Group, Tracking
from benchmarks.tracking import report
from benchmarks.tracking.train import Experiment, Finished, Recipe, train_group
from benchmarks.tracking.variants import NAMES, Variant, largest_factor, variant_config
from mdn_jax import MDNConfig

TaskName = Literal["parity", "mod3", "mod5", "s5"]

_GROUPS: dict[TaskName, Group] = {"parity": "z2", "mod3": "z3", "mod5": "z5", "s5": "s5"}


@dataclass(frozen=True)
class TrackingConfig(ExperimentConfig):
    """Trains models on short rows, seeds and learning rates side by side; tests them on long ones.

    Runs that are in the output directory already are not made again, and one that was cut short
    goes on from its checkpoint. The table and the figure are of all runs there.
    """

    tasks: tuple[TaskName, ...] = get_args(TaskName)
    """Ones so far modulo 2, 3 and 5; the product of permutations of five things so far."""
    mixers: tuple[Variant, ...] = get_args(Variant)
    """What is compared; MDN as published, slow to forget at first (f below 0.4), free within the
    region of stability, and without bounds; GDN with a step size up to 1 and up to 2."""
    trained: int = 128
    """Elements in a row of the training."""
    tested: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """Lengths that accuracy is measured at."""
    hidden_size: int = 64
    """Width of the models."""
    layers: int = 2
    """Layers of the models."""
    heads: int = 4
    """Key heads of the models; the width of a key head is `hidden_size / heads`."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Peaks; the report shows the best one of each model, chosen on rows of their own."""
    steps: int = 8000
    """Optimizer steps."""
    batch_size: int = 64
    """Rows in a step."""
    points: int = 40
    """Measurements of the training curve; between two of them the command can stop."""
    test_rows: int = 512
    """Rows that the accuracy is measured on, and as many for the choice of the learning rate."""
    test_batch: int = 16
    """Of these at once, for each run."""
    output: Path = Path("runs/tracking")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_some("tasks", "mixers", "tested")
        self.check_positive("trained", "layers", "heads", "steps", "batch_size", "points")
        self.check_positive("test_rows", "test_batch")
        if any(x >= y for x, y in itertools.pairwise((0, *self.tested))):
            raise ValueError(f"tested: expected ascending ints >= 1, got {self.tested!r}")
        _model(self, "parity", "gdn")  # raises


_SMOKE: dict[str, Any] = {
    "trained": 8,
    "tested": (8, 16),
    "hidden_size": 16,
    "layers": 1,
    "heads": 2,
    "seeds": (0,),
    "learning_rates": (1e-3, 1e-2),
    "steps": 4,
    "batch_size": 4,
    "points": 2,
    "test_rows": 8,
    "test_batch": 4,
    "implementation": "scan",
}


def recipe_of(config: TrackingConfig) -> Recipe:
    """What is the same for all models."""
    return Recipe(**{name: getattr(config, name) for name in Recipe._fields})


def tracking(config: Annotated[TrackingConfig, tyro.conf.arg(name="")]) -> None:
    """Parity, counting, permutations: records as runs finish, then the table and the figure."""
    if config.smoke:
        config = dataclasses.replace(config, **_SMOKE)

    def train(records: Records, clock: Clock, commit: str) -> bool:
        return all(
            _train(config, records, clock, commit, task, variant)
            for task in config.tasks
            for variant in config.mixers
        )

    recipe = recipe_of(config)._asdict()
    run_experiment("tracking", config, recipe=recipe, train=train, write=report.write)


def _model(config: TrackingConfig, task: TaskName, variant: Variant) -> MDNConfig:
    return variant_config(
        variant,
        vocab_size=Tracking(group=_GROUPS[task]).vocab_size,
        hidden_size=config.hidden_size,
        layers=config.layers,
        heads=config.heads,
    )


def _train(
    config: TrackingConfig,
    records: Records,
    clock: Clock,
    commit: str,
    task: TaskName,
    variant: Variant,
) -> bool:
    """All runs of one model on one task; whether they are done."""
    recipe, model = recipe_of(config), _model(config, task, variant)
    setting = {
        "experiment": "tracking",
        "task": task,
        "variant": variant,
        "model": model.to_dict(),
        "recipe": recipe._asdict(),
    }
    experiment = Experiment(_GROUPS[task], model, recipe, largest_factor(variant))
    for runs in groups(config.seeds, config.learning_rates, config.side_by_side):
        missing = [run for run in runs if not records.find(setting | run._asdict())]
        if not missing:
            continue
        if not clock.allows(0):
            return False
        about = {
            **model_size(model)._asdict(),
            "chance": 1 / model.vocab_size,
            "commit": commit,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "side_by_side": len(runs),
        }

        def finished(done: Finished, about: dict[str, Any] = about) -> None:
            _add(records, setting, about, done)

        if not train_group(
            experiment,
            missing,
            checkpoint=config.output / "unfinished" / checkpoint_name(setting, runs),
            clock=clock,
            finished=finished,
        ):
            return False
    return True


def _add(records: Records, setting: dict[str, Any], about: dict[str, Any], done: Finished) -> None:
    """The record of a run, once: a checkpoint may be older than it."""
    if records.find(setting | done.run._asdict()):
        return
    values = {name: x for name, x in done._asdict().items() if name != "run"}
    records.add({**setting, **done.run._asdict(), **values, **about})
    accuracies = " ".join(f"{length} {100 * x:.1f}" for length, x in done.test.items())
    print(
        f"{setting['task']:6} {NAMES[setting['variant']]:24} seed {done.run.seed} "
        f"rate {done.run.learning_rate:g} ({done.end}): {accuracies}",
        flush=True,
    )
