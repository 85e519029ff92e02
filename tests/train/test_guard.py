"""Which steps are refused, and what a run of refused steps leads to."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.helpers import tiny_config
from train import loop
from train.config import GuardConfig
from train.errors import RunError
from train.guard import init_guard, judge, raise_refused
from train.loop import train
from train.metrics import read_metrics


def run(config, losses, norms=None):
    """Taken and spike of every step, and the statistics at the end."""
    guard, answers = init_guard(), []
    step = jax.jit(partial(judge, config))
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        taken, spike, guard = step(guard, jnp.float32(loss), jnp.float32(norm))
        answers.append((bool(taken), bool(spike)))
    return answers, guard


def test_statistics_are_the_mean_and_the_deviation_of_the_steps_taken():
    losses = np.random.default_rng(0).normal(3.0, 0.1, 50)
    _, guard = run(GuardConfig(window=64), losses, list(2 * losses))
    assert guard.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert guard.variance == pytest.approx(losses.var(), rel=1e-3)
    assert guard.grad_norm == pytest.approx(2 * losses.mean(), rel=1e-5)
    assert int(guard.taken) == 50
    _, guard = run(GuardConfig(window=4), [1.0] * 50 + [2.0] * 50)
    assert guard.loss == pytest.approx(2.0, abs=1e-4)  # the window reaches back a few steps


@pytest.mark.parametrize("kind", ["loss", "norm"])
def test_a_spike_is_refused_and_leaves_the_statistics_as_they_were(kind):
    config = GuardConfig(action="skip", window=8, loss_deviations=5.0, grad_norm_factor=4.0)
    losses, norms = [3.0, 3.1] * 6, [1.0, 1.2] * 6
    _, before = run(config, losses, norms)
    losses += [3.2, 4.0] if kind == "loss" else [3.1, 3.1]  # mean 3.05, deviation 0.05
    norms += [1.0, 1.0] if kind == "loss" else [4.0, 9.0]
    answers, after = run(config, [*losses, 3.0], [*norms, 1.0])
    assert answers[-3:] == [(True, False), (False, True), (True, False)]
    assert int(after.taken) == int(before.taken) + 2
    assert int(after.refused) == 0
    assert not run(GuardConfig(action="off", window=8), losses, norms)[0][-1][1]


def test_nothing_is_a_spike_before_the_window_is_full():
    config = GuardConfig(action="skip", window=8)
    assert run(config, [3.0] * 7 + [90.0])[0][-1] == (True, False)
    assert run(config, [3.0, 3.1] * 4 + [90.0])[0][-1] == (False, True)


def test_what_is_not_finite_is_refused_whatever_the_action():
    answers, guard = run(GuardConfig(), [1.0, np.nan, np.inf, 1.0, 1.0], [1, 1, 1, np.nan, np.inf])
    assert answers == [(True, False)] + 4 * [(False, False)]
    assert int(guard.refused) == 4
    assert guard.loss == 1.0


def test_errors_say_what_was_expected():
    call = partial(raise_refused, step=7, loss=9.0, grad_norm=2.0)
    call(GuardConfig(action="skip"), spike=True, refused=1)
    with pytest.raises(RunError, match=r"guard: expected a loss within 6 .* got loss 9 .* step 7"):
        call(GuardConfig(action="stop"), spike=True, refused=1)
    with pytest.raises(RunError, match=r"guard: expected fewer than 50 refused steps in a row"):
        call(GuardConfig(), spike=False, refused=50)


def poisoned(step_of_spike):
    """Batches whose targets are far from likely at one step."""
    batch = loop.PackedRows.batch

    def changed(self, step):
        values = batch(self, step)
        if step == step_of_spike:
            values = values | {"targets": np.full_like(values["targets"], 255)}
        return values

    return changed


@pytest.mark.slow
def test_runs_skip_or_stop_at_a_spike(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.PackedRows, "batch", poisoned(5))
    options = {"steps": 8, "eval_every": 9, "checkpoint_every": 4}

    def config(action):
        guard = GuardConfig(action=action, window=3, loss_deviations=1.0, grad_norm_factor=100.0)
        return tiny_config(corpus, tmp_path / action, guard=guard, **options)

    assert int(train(config("off")).state.skipped) == 0
    skipped = train(config("skip"))
    assert int(skipped.state.skipped) == 1
    records = read_metrics(tmp_path / "skip" / "metrics.jsonl")
    assert [r["skipped"] for r in records if "skipped" in r] == [0, 0, 0, 0, 0, 1, 1, 1]
    with pytest.raises(RunError, match=r"guard: expected a loss within 1 .* at step 6"):
        train(config("stop"))
    assert {p.name for p in (tmp_path / "stop" / "checkpoints").iterdir()} == {"4"}
    saved = json.loads((tmp_path / "stop" / "config.json").read_text())
    assert saved["guard"]["action"] == "stop"
