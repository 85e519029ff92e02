"""Members side by side, the order of batches, early stop, restart."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.mqar import group
from benchmarks.mqar.data import Setting
from benchmarks.mqar.group import Progress, train_group
from benchmarks.mqar.model import model_shape
from benchmarks.mqar.train import (
    Recipe,
    Steps,
    Stretch,
    batch_order,
    draw_data,
    epoch_factor,
    row_order,
)
from benchmarks.runs import Clock, Run

RECIPE = Recipe(
    trained=(Setting(1, 8, 24), Setting(2, 16, 8)),
    measured=(Setting(1, 8, 8),),
    extrapolated=(Setting(3, 16, 8),),
    epochs=2,
    batch_size=4,
    weight_decay=0.1,
    stop_at=0.99,
    data_seed=0,
    implementation="scan",
    dtype="float32",
)
VOCABULARY = 16
RUNS = [Run(0, 1e-2), Run(0, 1e-3), Run(1, 1e-2)]


class Stop(Clock):
    """A clock that says stop after a number of calls."""

    def __init__(self, calls):
        super().__init__(None)
        self.calls = calls

    def allows(self, seconds):
        self.calls -= 1
        return self.calls >= 0


@pytest.fixture(scope="module")
def steps():
    return Steps(model_shape("attention", 8, "width", VOCABULARY), RECIPE)


@pytest.fixture(scope="module")
def data():
    return draw_data(RECIPE, VOCABULARY)


def train(steps, data, path, runs=RUNS, calls=1000, recipe=RECIPE):
    found = []
    checkpoint = path / "group.npz"
    options = {"checkpoint": checkpoint, "clock": Stop(calls), "finished": found.append}
    complete = train_group(steps, recipe, data, runs, call_steps=3, **options)
    assert checkpoint.exists() == (not complete and calls > 0)
    return complete, found


def same(one, other):
    assert one.run == other.run
    assert (one.epochs, one.end) == (other.epochs, other.end)
    assert (one.choice, one.test) == (other.choice, other.test)
    np.testing.assert_allclose(one.curve, other.curve, rtol=1e-5)


@pytest.mark.slow
def test_side_by_side_is_one_by_one(steps, data, tmp_path):
    complete, together = train(steps, data, tmp_path)
    assert complete
    assert [done.run for done in together] == RUNS
    for run, done in zip(RUNS, together, strict=True):
        same(train(steps, data, tmp_path, [run])[1][0], done)
    losses = [done.curve[-1][0] for done in together]
    assert len(set(losses)) == 3


@pytest.mark.slow
def test_restarts_change_nothing(steps, data, tmp_path):
    _, never = train(steps, data, tmp_path)
    for calls in (1, 2, 2):  # in an epoch, and at the end of one; 8 steps are three calls
        assert train(steps, data, tmp_path, calls=calls) == (False, [])
    at = Progress.load(tmp_path / "group.npz", steps)
    assert (at.epoch, at.step) == (1, 6)
    assert at.minutes > 0
    complete, rest = train(steps, data, tmp_path)
    assert complete
    for one, other in zip(never, rest, strict=True):
        assert one._replace(minutes=0.0) == other._replace(minutes=0.0)


@pytest.mark.slow
def test_nothing_begins_that_would_not_be_over(steps, data, tmp_path, monkeypatch):
    seconds = itertools.count(0.0, 0.25)  # at every look, however busy the machine is
    monkeypatch.setattr(group, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    asked = []

    class Watch(Stop):
        def allows(self, seconds):
            asked.append(seconds)
            return super().allows(seconds)

    clock = Watch(4)
    clock.first = {"steps": 7.0, "epoch": 5.0}
    options = {"checkpoint": tmp_path / "group.npz", "clock": clock, "finished": asked.append}
    assert not train_group(steps, RECIPE, data, RUNS, call_steps=3, **options)
    assert asked[0] == 7.0  # as long as the last group's first steps
    assert 5.0 < asked[2] < 12.0  # with an end of the epoch, which there was none of yet
    assert max(asked[1], asked[3], asked[4], *clock.first.values()) < 5.0


@pytest.mark.slow
def test_members_that_are_done_leave(steps, data, tmp_path):
    broken = [Run(0, 1e-3), Run(0, float("inf")), Run(1, float("inf"))]
    complete, found = train(steps, data, tmp_path, broken)
    assert complete
    assert [(done.run, done.end, done.epochs) for done in found] == [
        (broken[1], "diverged", 1),
        (broken[2], "diverged", 1),
        (broken[0], "epochs", 2),
    ]
    assert found[0].curve[0][0] is None
    same(train(steps, data, tmp_path, broken[:1])[1][0], found[2])


@pytest.mark.slow
def test_a_member_that_is_done_stays_as_it_is(steps, data):
    seeds = jnp.asarray([0, 0, 1])
    members = steps.start(seeds)._replace(done=jnp.asarray([True, False, False]))
    order = [jnp.asarray(x) for x in batch_order(RECIPE, 0)]
    before = jax.tree.map(np.asarray, members.params)
    rows, place = row_order(RECIPE, (0, 0, 1), 0), [jnp.asarray(i) for i in (0, 0, 2)]
    rates = jnp.asarray([1e-2] * 3)
    after = steps.advance(members, seeds, rates, rows, data.trained, Stretch(*order, *place))
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_array_equal(x[0], y[0])
    assert (after.params["embeddings"][1] != before["embeddings"][1]).any()


@pytest.mark.slow
def test_early_stop(steps, data, tmp_path):
    recipe = RECIPE._replace(stop_at=-1.0)
    _, found = train(steps, data, tmp_path, recipe=recipe)
    assert [(done.epochs, done.end, len(done.curve)) for done in found] == [(1, "accuracy", 1)] * 3


def test_batches_of_an_epoch():
    settings, numbers = batch_order(RECIPE, 0)
    assert sorted(zip(settings.tolist(), numbers.tolist(), strict=True)) == [
        *((0, i) for i in range(6)),
        *((1, i) for i in range(2)),
    ]
    assert settings.tolist() != batch_order(RECIPE, 1)[0].tolist()


@pytest.mark.slow
def test_every_row_is_seen_once_an_epoch(data, monkeypatch):
    steps = Steps(model_shape("attention", 8, "width", VOCABULARY), RECIPE)
    seen = []

    def loss(params, batch, key):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), batch.tokens)
        return jnp.sum(params["embeddings"])

    monkeypatch.setattr(steps, "_loss", loss)
    settings, numbers = (jnp.asarray(x) for x in batch_order(RECIPE, 0))
    member, rows = jax.tree.map(
        lambda x: x[0], (steps.start(jnp.asarray([0])), row_order(RECIPE, (0,), 0))
    )
    end = len(settings)
    jax.block_until_ready(
        steps._advance(member, 0, 0.0, rows, data.trained, Stretch(settings, numbers, 0, 0, end))
    )
    jax.effects_barrier()
    for rows in data.trained:
        length = rows.tokens.shape[1]
        got = np.concatenate([x for x in seen if x.shape[1] == length])
        assert sorted(got.tolist()) == sorted(rows.tokens.tolist())


def test_seeds_and_epochs_have_their_own_order():
    first, second = (row_order(RECIPE, (0, 1), epoch)[0].tolist() for epoch in (0, 1))
    assert len({tuple(order) for order in first + second}) == 4
    assert row_order(RECIPE, (1,), 1)[0][0].tolist() == second[1]


def test_rows_of_the_parts_differ(data):
    assert not (data.choice[0].tokens == data.test[0].tokens).all(axis=1).any()


def test_the_rate_follows_half_a_cosine():
    recipe = RECIPE._replace(epochs=4)
    factors = [epoch_factor(recipe, epoch) for epoch in range(4)]
    np.testing.assert_allclose(factors, [1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5])
