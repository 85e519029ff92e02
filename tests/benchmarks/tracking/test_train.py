"""Runs side by side, accuracy by length, restart."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.runs import Clock, Run
from benchmarks.tasks.tracking import Tracking
from benchmarks.tracking import train
from benchmarks.tracking.train import Experiment, Progress, Recipe, train_group
from benchmarks.tracking.variants import variant_config

RECIPE = Recipe(
    trained=6,
    tested=(4, 6, 16),
    hidden_size=8,
    layers=1,
    heads=1,
    steps=6,
    batch_size=4,
    weight_decay=0.1,
    points=3,
    test_rows=8,
    test_batch=4,
    implementation="scan",
    dtype="float32",
)
RUNS = [Run(0, 1e-2), Run(0, float("inf")), Run(1, 1e-2)]


class Stop(Clock):
    """A clock that says stop after a number of calls."""

    def __init__(self, calls):
        super().__init__(None)
        self.calls, self.asked = calls, []

    def allows(self, seconds):
        self.asked.append(seconds)
        return len(self.asked) <= self.calls


@pytest.fixture(scope="module")
def experiment():
    sizes = {"hidden_size": 8, "layers": 1, "heads": 1}
    return Experiment("z3", variant_config("gdn_negative", vocab_size=3, **sizes), RECIPE, 4.0)


def run_group(experiment, path, calls=1000, clock=None):
    found = []
    options = {"checkpoint": path / "group.npz", "clock": clock or Stop(calls)}
    complete = train_group(experiment, RUNS, finished=found.append, **options)
    return complete, found


@pytest.mark.slow
def test_restarts_change_nothing(experiment, tmp_path):
    complete, never = run_group(experiment, tmp_path)
    assert complete
    assert [done.run for done in never] == RUNS
    assert [done.end for done in never] == ["steps", "diverged", "steps"]
    assert [step for step, _, _ in never[0].curve] == [2, 4, 6]
    assert never[0].curve[0][1] != never[2].curve[0][1]  # seeds have rows of their own
    assert never[1].curve[-1][1] is None
    assert list(never[0].test) == ["4", "6", "16"]
    for calls in (0, 1, 2):  # before anything, between steps, before the measurement
        assert run_group(experiment, tmp_path, calls) == (False, [])
        assert (tmp_path / "group.npz").exists() == (calls > 0)
    at = Progress.load(tmp_path / "group.npz", experiment)
    assert (at.step, at.runs) == (6, RUNS)
    assert at.minutes > 0
    complete, rest = run_group(experiment, tmp_path)
    assert complete
    assert not (tmp_path / "group.npz").exists()
    for one, other in zip(never, rest, strict=True):
        assert one._replace(minutes=0.0) == other._replace(minutes=0.0)


@pytest.mark.slow
def test_nothing_begins_that_would_not_be_over(experiment, tmp_path, monkeypatch):
    seconds = itertools.count(0.0, 0.25)  # at every look, however busy the machine is
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    clock = Stop(3)
    clock.first = {"steps": 7.0, "measure": 5.0}
    assert not run_group(experiment, tmp_path, clock=clock)[0]
    assert clock.asked == [7.0, 0.25, 0.25, 5.0]  # as long as the last group's, then its own
    assert clock.first == {"steps": 0.25, "measure": 5.0}


@pytest.mark.slow
def test_accuracy_is_by_the_places_of_each_length(experiment):
    members = experiment.start(jnp.asarray([3]), jnp.asarray([1e-2]))
    measured = [experiment.measure(members, part)[0] for part in (0, 1)]
    assert measured[0] != measured[1]
    member = jax.tree.map(lambda x: x[0], members)
    model = nnx.merge(experiment._steps.graph, member.params)
    long, right = Tracking(group="z3", length=16), []
    for batch in (2, 3):  # of the second part; the training has the numbers below 6
        key = jax.random.fold_in(member.data, 6 + batch)
        tokens, targets = long.sample(key, 4, jnp.asarray(6))
        right.append(np.argmax(nnx.jit(lambda m, x: m(x)[0])(model, tokens), -1) == targets)
    right = np.concatenate(right)
    stretches = {"4": (0, 4), "6": (4, 6), "16": (6, 16)}
    expected = {name: right[:, a:b].mean() for name, (a, b) in stretches.items()}
    assert measured[1] == pytest.approx(expected)
