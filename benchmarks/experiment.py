"""The frame of an experiment whose runs train side by side: its options, its records, its end."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from benchmarks.records import Records
from benchmarks.run_reports import read_experiment
from benchmarks.runs import Clock, working_commit
from mdn_jax.compiled import compiled_once
from mdn_jax.ops.api import Implementation


@dataclass(frozen=True)
class ExperimentConfig:
    """Options that all of them have."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is one initialisation and one order or draw of the rows."""
    learning_rates: tuple[float, ...] = (1e-3, 3.2e-3, 1e-2)
    """The report shows the best one of each model, chosen on rows of their own."""
    weight_decay: float = 0.1
    """Of matrices."""
    side_by_side: int = 9
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
    output: Path = Path("runs/experiment")
    """Directory of `results.jsonl`, `table.md`, `accuracy.png` and checkpoints (`unfinished`)."""
    smoke: bool = False
    """Whether it runs, not how well: tiny models and rows, few steps."""

    def __post_init__(self) -> None:
        self.check_some("seeds", "learning_rates")
        self.check_positive("side_by_side")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes: expected a number > 0 or None, got {self.minutes!r}")

    def check_some(self, *names: str) -> None:
        """Raises ValueError for the first of these options that is empty."""
        for name in names:
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one, got none")

    def check_positive(self, *names: str) -> None:
        """Raises ValueError for the first of these options that is below 1."""
        for name in names:
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {value!r}")


def run_experiment(
    name: str,
    config: ExperimentConfig,
    *,
    recipe: Mapping[str, Any],
    train: Callable[[Records, Clock, str], bool],
    write: Callable[[Sequence[Mapping[str, Any]], Path], str],
) -> None:
    """Writes records as runs finish, then the report.

    Args:
      name: of the experiment in its records.
      config: its options.
      recipe: what is the same for all models.
      train: makes the runs that the records lack, of this commit, while there is time; whether all
        are there.
      write: writes the report of records into a directory; the text of its table.

    Raises:
      SystemExit: nothing to report, no commit, or runs that do not fit into the memory.
    """
    if config.report:
        print(write(read_experiment(config.report, name), config.output))
        return
    # the default leaves a quarter of the device unused; read when jax first asks for devices
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    clock = Clock(config.minutes)
    commit = config.commit or working_commit(needed=not config.smoke)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, commit {commit}")
    with (
        Records(config.output / "results.jsonl") as records,
        compiled_once(config.output / "compiled"),
    ):
        try:
            complete = train(records, clock, commit)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise SystemExit(
                f"side_by_side: expected what fits into the memory, got {config.side_by_side} "
                "runs at once"
            ) from error
        found = records.find({"experiment": name, "recipe": dict(recipe)})
    if found:
        print(write(found, config.output))
    if not complete:
        print(f"The {config.minutes:g} minutes are over; the same command goes on.")
