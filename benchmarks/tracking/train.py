"""Trains the runs of one model to their end, within the time there is, across restarts."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from benchmarks.runs import Clock, Run, save_group, saved_runs, saved_state
from benchmarks.tasks.tracking import Group, Tracking
from benchmarks.tasks.train import Member, Steps
from benchmarks.tasks.train import Recipe as TaskRecipe
from mdn_jax import MDNConfig
from mdn_jax.ops.api import Implementation


class Recipe(NamedTuple):
    """How every model is trained and measured.

    Attributes:
      trained: elements in a row of the training.
      tested: ends of the stretches of a longer row that accuracy is measured on, ascending.
      hidden_size: width of the models.
      layers: of the models.
      heads: of the models.
      steps: optimizer steps.
      batch_size: rows in a step.
      weight_decay: of matrices.
      points: measurements of the training curve.
      test_rows: rows of the choice of the learning rate, and as many of the test.
      test_batch: of them at once, for each run.
      implementation: of the mixer's rule.
      dtype: of activations.
    """

    trained: int
    tested: tuple[int, ...]
    hidden_size: int
    layers: int
    heads: int
    steps: int
    batch_size: int
    weight_decay: float
    points: int
    test_rows: int
    test_batch: int
    implementation: Implementation | None
    dtype: str


class Finished(NamedTuple):
    """What is known of a run at its end.

    Attributes:
      run: which.
      end: "steps", or "diverged" (its loss is not finite).
      choice: accuracy by length, on rows by which a learning rate may be chosen.
      test: the same on other rows.
      curve: steps, training loss (None: not finite) and training accuracy at each point.
      minutes: that the group had taken by then, compiling included.
    """

    run: Run
    end: str
    choice: dict[str, float]
    test: dict[str, float]
    curve: list[tuple[int, float | None, float]]
    minutes: float


class Experiment:
    """One model on one task: compiled functions of all runs side by side.

    Args:
      group: of the task.
      model: sizes and mixer.
      recipe: of the training.
      largest_factor: of MDN's gates at initialisation.
    """

    def __init__(self, group: Group, model: MDNConfig, recipe: Recipe, largest_factor: float):
        self.recipe = recipe
        self._long = Tracking(group=group, length=max(recipe.tested))
        task_recipe = TaskRecipe(
            steps=recipe.steps,
            batch_size=recipe.batch_size,
            weight_decay=recipe.weight_decay,
            points=recipe.points,
            test_rows=recipe.test_rows,
            implementation=recipe.implementation,
            dtype=recipe.dtype,
            largest_factor=largest_factor,
        )
        self._steps = Steps(Tracking(group=group, length=recipe.trained), model, task_recipe)
        self.advance = jax.jit(
            jax.vmap(self._steps.advance, in_axes=(0, None, None)), donate_argnums=0
        )
        self._measure = jax.jit(jax.vmap(self._right_by_place, in_axes=(0, None)))

    def start(self, seeds: Int[Array, " M"], rates: Float[Array, " M"]) -> Member:
        """Before the first step."""
        return jax.vmap(self._steps.start)(seeds, rates)

    def measure(self, members: Member, part: int) -> list[dict[str, float]]:
        """Accuracy of each run by length: of the places that the length before does not have.

        Args:
          members: stacked.
          part: 0 or 1; no row is in both.
        """
        right = np.asarray(self._measure(members, part))  # [M, T]
        ends = self.recipe.tested
        stretches = list(zip((0, *ends[:-1]), ends, strict=True))
        return [{str(end): float(own[a:end].mean()) for a, end in stretches} for own in right]

    def _right_by_place(self, member: Member, part: Int[Array, ""]) -> Float[Array, " T"]:
        """Part of the rows that are right, at each place."""
        recipe = self.recipe
        batches = -(-recipe.test_rows // recipe.test_batch)
        model = nnx.merge(self._steps.graph, member.params)

        def batch(total: Array, i: Array) -> tuple[Array, None]:
            # the training has the numbers below
            key = jax.random.fold_in(member.data, recipe.steps + part * batches + i)
            examples = self._long.sample(key, recipe.test_batch, jnp.asarray(recipe.trained))
            logits, _ = model(examples.tokens)
            right = jnp.argmax(logits, axis=-1) == examples.targets
            return total + jnp.mean(right, axis=0), None

        zeros = jnp.zeros((max(recipe.tested),))
        return jax.lax.scan(batch, zeros, jnp.arange(batches))[0] / batches


@dataclasses.dataclass
class Progress:
    """Where a group stands; all of it is in a checkpoint.

    Attributes:
      runs: of the members.
      members: stacked.
      curve: step, training loss and accuracy at each point so far, `[points, 3, M]`.
      minutes: taken so far.
    """

    runs: list[Run]
    members: Member
    curve: list[np.ndarray]
    minutes: float

    @property
    def step(self) -> int:
        """The next one."""
        return int(self.curve[-1][0, 0]) if self.curve else 0

    def save(self, path: Path) -> None:
        """Writes a checkpoint, complete or not at all."""
        curve = np.stack(self.curve) if self.curve else np.zeros((0, 3, len(self.runs)))
        save_group(path, self.runs, self.members, curve=curve, minutes=self.minutes)

    @classmethod
    def load(cls, path: Path, experiment: Experiment) -> "Progress":
        """Reads a checkpoint of the same model."""
        with np.load(path) as saved:
            runs = saved_runs(saved)
            members = saved_state(saved, jax.eval_shape(experiment.start, *_arrays(runs)))
            return cls(runs, members, list(saved["curve"]), float(saved["minutes"]))


def train_group(
    experiment: Experiment,
    runs: Sequence[Run],
    *,
    checkpoint: Path,
    clock: Clock,
    finished: Callable[[Finished], None],
    save_seconds: float = 120.0,
) -> bool:
    """Trains and measures all runs, or until the clock says stop; then there is a checkpoint.

    Nothing is begun that would not be over in time, as far as one knows from what came before.

    Args:
      experiment: model and task.
      runs: side by side. A checkpoint that is there goes before them.
      checkpoint: file; gone at the end.
      clock: of the command.
      finished: called with each run at the end.
      save_seconds: between two checkpoints.

    Returns:
      Whether all runs are done.
    """
    recipe = experiment.recipe
    if checkpoint.exists():
        at = Progress.load(checkpoint, experiment)
    else:
        at = Progress(list(runs), experiment.start(*_arrays(runs)), [], 0.0)
    points = min(recipe.points, recipe.steps)
    ends = [round(recipe.steps * (i + 1) / points) for i in range(points)]
    took = {"steps": 0.0, "measure": 0.0, **clock.first}  # seconds, the last time
    saved, first = time.monotonic(), True
    for end in ends[len(at.curve) :]:
        if not clock.allows(took["steps"]):
            return _stop(at, checkpoint)
        began = time.monotonic()
        at.members, loss, accuracy = jax.block_until_ready(
            experiment.advance(at.members, at.step, end)
        )
        at.curve.append(np.stack([np.full(len(at.runs), end), loss, accuracy]))
        took["steps"] = _add_time(at, began)
        if first:  # which compiled
            clock.first["steps"], first = took["steps"], False
        if time.monotonic() - saved > save_seconds:
            at.save(checkpoint)
            saved = time.monotonic()
    if not clock.allows(took["measure"]):
        return _stop(at, checkpoint)
    began = time.monotonic()
    measured = [experiment.measure(at.members, part) for part in (0, 1)]
    clock.first["measure"] = _add_time(at, began)
    for i, (run, choice, test) in enumerate(zip(at.runs, *measured, strict=True)):
        curve = [
            (int(step), float(loss) if np.isfinite(loss) else None, float(accuracy))
            for step, loss, accuracy in (point[:, i] for point in at.curve)
        ]
        end_of_run = "diverged" if curve[-1][1] is None else "steps"
        finished(Finished(run, end_of_run, choice, test, curve, at.minutes))
    with contextlib.suppress(FileNotFoundError):
        checkpoint.unlink()
    return True


def _stop(at: Progress, checkpoint: Path) -> bool:
    if at.minutes:
        at.save(checkpoint)
    return False


def _add_time(at: Progress, began: float) -> float:
    """Seconds since then, which the group has taken."""
    seconds = time.monotonic() - began
    at.minutes += seconds / 60
    return seconds


def _arrays(runs: Sequence[Run]) -> tuple[Any, Any]:
    return (
        jnp.asarray([run.seed for run in runs]),
        jnp.asarray([run.learning_rate for run in runs], jnp.float32),
    )
