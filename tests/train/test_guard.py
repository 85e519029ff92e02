"""Which steps are refused, and what a run of refused steps leads to."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdn_jax.errors import RunError
from mdn_jax.models.loss import summed_loss
from tests.train.helpers import assert_identical, random_batch, tiny_config
from train.config_sections import GuardConfig, OptimizerConfig
from train.guard import DivergedError, init_guard, judge, raise_refused
from train.loop import train
from train.optimizer import make_optimizer, make_schedule
from train.step import init_state, make_train_step


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
    words = r"guard: expected fewer than 50 refused steps in a row"
    with pytest.raises(DivergedError, match=words) as diverged:
        call(GuardConfig(), spike=False, refused=50)
    assert diverged.value.step == 7


def table_loss(params, batch):
    return summed_loss(params["embeddings"][batch["tokens"]], params["lm_head"], batch["targets"])


def test_a_step_that_is_a_spike_changes_nothing_but_the_counts():
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, decay_steps=100)
    schedule = make_schedule(config, 100)
    optimizer = make_optimizer(config, schedule)
    guard = GuardConfig(action="skip", window=4, loss_deviations=4.0, grad_norm_factor=50.0)
    step = make_train_step(table_loss, optimizer, schedule, guard=guard)
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "embeddings": jax.random.normal(keys[0], (257, 8)),
        "lm_head": jax.random.normal(keys[1], (8, 257)),
    }
    state = init_state(params, optimizer)
    for seed in range(6):
        state, metrics = step(state, random_batch(seed, 16, 16))
        assert not metrics.spike
    before = jax.tree.map(np.array, state)
    odd = random_batch(6, 16, 16)
    unlikely = jnp.argmin(before.params["embeddings"] @ before.params["lm_head"], axis=1)
    odd["targets"] = np.asarray(unlikely)[odd["tokens"]]
    state, metrics = step(state, odd)
    assert metrics.spike
    assert int(metrics.skipped) == int(metrics.refused) == 1
    assert_identical(jax.tree.map(np.array, (state.params, state.opt_state)), before[:2])
    assert state.guard.loss == before.guard.loss
    state, metrics = step(state, random_batch(7, 16, 16))
    assert (int(metrics.skipped), int(metrics.refused), int(state.step)) == (1, 0, 8)
    assert metrics.learning_rate == pytest.approx(float(schedule(6)))


@pytest.mark.slow
def test_a_run_stops_at_a_spike(corpus, tmp_path, monkeypatch):
    make = make_train_step

    def with_a_spike(*arguments, **options):
        step = make(*arguments, **options)

        def run(state, batch):
            if int(state.step) == 5:  # a byte that the text has not
                batch = batch | {"targets": jnp.full_like(batch["targets"], 255)}
            return step(state, batch)

        return run

    monkeypatch.setattr("train.model_and_step.make_train_step", with_a_spike)
    guard = GuardConfig(action="stop", window=3, loss_deviations=1.0, grad_norm_factor=100.0)
    options = {"steps": 8, "eval_every": 9, "checkpoint_every": 4, "log_every": 4}
    config = tiny_config(corpus, tmp_path / "run", guard=guard, **options)
    with pytest.raises(
        RunError, match=r"guard: expected a loss within 1 .* at step 6;.* step 4 .* --resume$"
    ):
        train(config)
    assert {path.name for path in (config.directory / "checkpoints").iterdir()} == {"4"}
    assert json.loads((config.directory / "config.json").read_text())["guard"]["action"] == "stop"
