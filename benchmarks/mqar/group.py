"""Trains the members of a group to their end, within the time there is, across restarts."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.mqar.train import (
    Data,
    Member,
    Recipe,
    Steps,
    Stretch,
    batch_order,
    epoch_factor,
    row_order,
)
from benchmarks.runs import Clock, Run, save_group, saved_runs, saved_state

CALL_STEPS = 100
"""Steps between two looks at the clock, at most."""


class Finished(NamedTuple):
    """What is known of a run at its end.

    Attributes:
      run: which.
      epochs: that it was trained for.
      end: "accuracy" (it passed `stop_at`), "diverged" (its loss is not finite), "epochs".
      choice: accuracy for each setting, on rows by which a learning rate may be chosen.
      test: the same on other rows.
      curve: training loss (None: not finite) and mean choice accuracy after each epoch.
      minutes: that the group had taken by then, compiling included.
    """

    run: Run
    epochs: int
    end: str
    choice: list[float]
    test: list[float]
    curve: list[tuple[float | None, float]]
    minutes: float


@dataclasses.dataclass
class Progress:
    """Where a group stands; all of it is in a checkpoint.

    Attributes:
      runs: of the members.
      members: stacked.
      curve: training loss and choice accuracy, `[M, epochs, 2]`, zeros for epochs to come.
      epoch: the current one.
      step: the next one of the epoch.
      minutes: taken so far.
    """

    runs: list[Run]
    members: Member
    curve: np.ndarray
    epoch: int
    step: int
    minutes: float

    def save(self, path: Path) -> None:
        """Writes a checkpoint, complete or not at all."""
        save_group(
            path,
            self.runs,
            self.members,
            curve=self.curve,
            place=[self.epoch, self.step],
            minutes=self.minutes,
        )

    @classmethod
    def load(cls, path: Path, steps: Steps) -> "Progress":
        """Reads a checkpoint of the same model."""
        with np.load(path) as saved:
            runs = saved_runs(saved)
            like = jax.eval_shape(steps.start, jnp.zeros(len(runs), jnp.int32))
            members = saved_state(saved, like)
            epoch, step = map(int, saved["place"])
            return cls(runs, members, saved["curve"], epoch, step, float(saved["minutes"]))


def train_group(
    steps: Steps,
    recipe: Recipe,
    data: Data,
    runs: Sequence[Run],
    *,
    checkpoint: Path,
    clock: Clock,
    finished: Callable[[Finished], None],
    call_steps: int = CALL_STEPS,
    save_seconds: float = 120.0,
) -> bool:
    """Trains until every run is done, or the clock says stop; then there is a checkpoint.

    Steps are not begun if they would not be over in time, as far as one knows from those before.

    Args:
      steps: of the model.
      recipe: of the training.
      data: all rows, on the device.
      runs: side by side. A checkpoint that is there goes before them.
      checkpoint: file; gone at the end.
      clock: of the command.
      finished: called with each run as it is done.
      call_steps: steps between two looks at the clock.
      save_seconds: between two checkpoints.

    Returns:
      Whether all runs are done.
    """
    if checkpoint.exists():
        at = Progress.load(checkpoint, steps)
    else:
        members = steps.start(jnp.asarray([run.seed for run in runs]))
        at = Progress(list(runs), members, np.zeros((len(runs), recipe.epochs, 2)), 0, 0, 0.0)
    took = {"steps": 0.0, "epoch": 0.0, **clock.first}  # seconds, the last time
    new = {"steps", "epoch"}
    saved = time.monotonic()
    while at.runs:
        length = len(batch_order(recipe, at.epoch)[0])
        last = at.step + call_steps >= length
        if not clock.allows(took["steps"] + (took["epoch"] if last else 0.0)):
            if at.minutes:
                at.save(checkpoint)
            return False
        began = time.monotonic()
        _call(steps, recipe, data, at, call_steps)
        took["steps"] = time.monotonic() - began
        if last:
            _end_of_epoch(steps, recipe, data, at, finished, began)
            took["epoch"] = time.monotonic() - began - took["steps"]
        for part in new & {"steps", "epoch" if last else "steps"}:
            clock.first[part] = took[part]
            new.remove(part)
        at.minutes += (time.monotonic() - began) / 60
        if time.monotonic() - saved > save_seconds:
            at.save(checkpoint)
            saved = time.monotonic()
    with contextlib.suppress(FileNotFoundError):
        checkpoint.unlink()
    return True


def _call(steps: Steps, recipe: Recipe, data: Data, at: Progress, most: int) -> None:
    """The next steps of the epoch."""
    settings, numbers = batch_order(recipe, at.epoch)
    end = min(at.step + most, len(settings))
    factor = epoch_factor(recipe, at.epoch)
    at.members = jax.block_until_ready(
        steps.advance(
            at.members,
            jnp.asarray([run.seed for run in at.runs]),
            jnp.asarray([factor * run.learning_rate for run in at.runs]),
            row_order(recipe, tuple(run.seed for run in at.runs), at.epoch),
            data.trained,
            Stretch(*map(jnp.asarray, (settings, numbers, at.epoch, at.step, end))),
        )
    )
    at.step = end % len(settings)


def _end_of_epoch(
    steps: Steps,
    recipe: Recipe,
    data: Data,
    at: Progress,
    finished: Callable[[Finished], None],
    began: float,
) -> None:
    """Measures, reports who is done, and goes on without them where it is worth compiling again.

    `began`: when the last call did.
    """
    before, count = np.asarray(at.members.done), len(batch_order(recipe, at.epoch)[0])
    loss = np.asarray(at.members.loss) / count
    choice = np.asarray(steps.measure(at.members.params, data.choice))  # [M, settings]
    at.curve[:, at.epoch] = np.stack([loss, choice.mean(axis=1)], axis=1)
    at.epoch += 1
    best = choice[np.argmax(choice.mean(axis=1))]
    print(
        f"epoch {at.epoch} of {recipe.epochs}, {at.minutes:.1f} min; the best of {len(at.runs)}:",
        *(f"{100 * accuracy:.1f}" for accuracy in best),
        flush=True,
    )
    passed, broken = choice.mean(axis=1) > recipe.stop_at, ~np.isfinite(loss)
    done = before | passed | broken | (at.epoch == recipe.epochs)
    if (done & ~before).any():
        test = np.asarray(steps.measure(at.members.params, data.test))
        for i in np.flatnonzero(done & ~before):
            end = "diverged" if broken[i] else "accuracy" if passed[i] else "epochs"
            curve = [
                (x if np.isfinite(x) else None, y) for x, y in at.curve[i, : at.epoch].tolist()
            ]
            finished(
                Finished(
                    at.runs[i],
                    at.epoch,
                    end,
                    choice[i].tolist(),
                    test[i].tolist(),
                    curve,
                    at.minutes + (time.monotonic() - began) / 60,
                )
            )
    members = at.members._replace(done=jnp.asarray(done), loss=jnp.zeros_like(at.members.loss))
    at.members = members
    kept = np.flatnonzero(~done)
    if 2 * len(kept) <= len(done):
        at.runs, at.curve = [at.runs[i] for i in kept], at.curve[kept]
        at.members = jax.tree.map(lambda x: x[jnp.asarray(kept)], members)
