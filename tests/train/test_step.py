import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.models.loss import IGNORED, summed_loss
from tests.tiny import TINY_MODEL
from tests.train.helpers import assert_identical, random_batch
from train.config import TrainConfig
from train.config_sections import OptimizerConfig
from train.evaluation.held_out import make_evaluate
from train.model_and_step import COMPILER_OPTIONS, ModelAndStep
from train.optimizer import make_optimizer, make_schedule
from train.step import init_state, make_train_step, rounded, split_model

CONFIG = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, decay_steps=100)
SCHEDULE = make_schedule(CONFIG, 100)
OPTIMIZER = make_optimizer(CONFIG, SCHEDULE)


def table_loss(params, batch):
    """A loss from the current token alone: everything about a step but the model."""
    h = params["embeddings"][batch["tokens"]] + params["bias"]
    return summed_loss(h, params["kernel"], batch["targets"])


def table_state(seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "embeddings": jax.random.normal(keys[0], (257, 8)),
        "kernel": jax.random.normal(keys[1], (8, 257)) * 0.1,
        "bias": jnp.zeros(8),
    }
    return init_state(params, OPTIMIZER)


def copy(tree):
    return jax.tree.map(np.array, tree)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_equals_one_large_batch(accumulation):
    batch = random_batch(3, 8, 5)
    batch["targets"][2:4] = IGNORED  # the micro-batches differ in their number of targets
    large, large_metrics = make_train_step(table_loss, OPTIMIZER, SCHEDULE)(table_state(), batch)
    step = make_train_step(table_loss, OPTIMIZER, SCHEDULE, accumulation=accumulation)
    small, small_metrics = step(table_state(), batch)
    np.testing.assert_allclose(small_metrics.loss, large_metrics.loss, rtol=1e-6)
    np.testing.assert_allclose(small_metrics.grad_norm, large_metrics.grad_norm, rtol=1e-5)
    moments = (optax.tree.get(s.opt_state, "mu") for s in (small, large))
    for a, b in zip(*map(jax.tree.leaves, moments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_metrics():
    batch = random_batch(5, 4, 6)
    state = table_state()
    counted = batch["targets"] != IGNORED
    expected = float(table_loss(state.params, batch)) / counted.sum()
    step = make_train_step(table_loss, OPTIMIZER, SCHEDULE)
    state, metrics = step(state, batch)
    assert metrics.loss == pytest.approx(expected, rel=1e-5)
    assert metrics.learning_rate == 0
    assert int(state.step) == 1
    state, metrics = step(state, batch)
    assert metrics.learning_rate == pytest.approx(5e-3)
    assert int(metrics.skipped) == 0


@pytest.mark.parametrize("autotune", ["cublas", "off"])
def test_the_compiler_knows_the_options_of_a_step(autotune):
    options = COMPILER_OPTIONS[autotune]
    step = make_train_step(table_loss, OPTIMIZER, SCHEDULE, compiler_options=options)
    _, metrics = step(table_state(), random_batch(5, 4, 6))
    assert np.isfinite(metrics.loss)
    unknown = {**options, "xla_no_such_option": True}
    step = make_train_step(table_loss, OPTIMIZER, SCHEDULE, compiler_options=unknown)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        step(table_state(), random_batch(5, 4, 6))


@pytest.mark.parametrize("autotune", ["all", "off"])
def test_a_run_compiles_its_step_with_what_its_configuration_says(autotune, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "train.model_and_step.make_train_step",
        lambda *_, compiler_options, **__: seen.append(compiler_options),
    )
    ModelAndStep(TrainConfig(model=MDNConfig(**TINY_MODEL), autotune=autotune, batch_size=8))
    assert seen == [COMPILER_OPTIONS[autotune]]


@functools.cache
def poisoned_step(accumulation):
    """A step that token 255 makes infinite, and 254 in its gradient alone."""

    def loss(params, batch):
        infinite, loss = jnp.any(batch["tokens"] == 255), table_loss(params, batch)
        # finite value, derivative nan at 0
        finite = jnp.where(jnp.any(batch["tokens"] == 254), 0.0, 1.0)
        loss += jnp.sum(0.0 * jnp.sqrt(finite * jnp.abs(params["bias"] + 1.0)))
        return jnp.where(infinite, jnp.inf, loss)

    return make_train_step(loss, OPTIMIZER, SCHEDULE, accumulation=accumulation)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(kind, accumulation):
    step = poisoned_step(accumulation)
    good, bad = random_batch(0, 4, 6), random_batch(1, 4, 6)
    for batch in (good, bad):
        batch["tokens"][batch["tokens"] >= 254] = 1
    bad["tokens"][0, 0] = 255 if kind == "loss" else 254
    state, _ = step(table_state(), good)
    before = copy(state)
    state, metrics = step(state, bad)
    assert np.isfinite(metrics.loss) == (kind == "gradient")
    assert np.isfinite(metrics.grad_norm) == (kind == "loss")  # each is enough to skip
    assert int(metrics.skipped) == int(state.skipped) == 1
    assert int(state.step) == 2
    assert_identical(copy(state.params), before.params)
    assert_identical(copy(state.opt_state), before.opt_state)
    state, metrics = step(state, good)
    assert metrics.learning_rate == pytest.approx(SCHEDULE(1))  # one update made, not two
    assert int(metrics.skipped) == 1
    assert (copy(state.params)["kernel"] != before.params["kernel"]).any()


def test_a_batch_without_targets_is_harmless():
    batch = random_batch(0, 2, 4, ignored=1.1)
    state, metrics = make_train_step(table_loss, OPTIMIZER, SCHEDULE)(table_state(), batch)
    assert metrics.loss == 0
    assert int(state.skipped) == 0


def test_evaluation_weighs_every_target_the_same():
    batches = [random_batch(0, 2, 4), random_batch(1, 2, 4, ignored=0.8)]
    params = table_state().params
    total = sum(float(table_loss(params, b)) for b in batches)
    count = sum(np.sum(b["targets"] != IGNORED) for b in batches)
    assert make_evaluate(table_loss, batches)(params).mean == pytest.approx(total / count, rel=1e-6)


@pytest.fixture(scope="module")
def tiny():
    return split_model(
        MDNForCausalLM(MDNConfig(**TINY_MODEL), implementation="scan", rngs=nnx.Rngs(0))
    )


def test_packed_documents_never_see_each_other(tiny):
    loss, params = tiny
    # both in two rows of 16, the rest of which does not count: compiled once
    documents = random_batch(0, 2, 8, ignored=0)
    filling = {"tokens": 0, "segment_ids": 0, "targets": IGNORED}
    apart, row = ({n: np.full((2, 16), x, np.int32) for n, x in filling.items()} for _ in "ab")
    for name in ("tokens", "targets"):
        apart[name][:, :8] = documents[name]
        row[name][0] = documents[name].reshape(16)
    row["segment_ids"][0] = np.repeat([4, 6], 8)
    run = jax.jit(jax.value_and_grad(loss))
    (together, gradient), (expected, expected_gradient) = run(params, row), run(params, apart)
    np.testing.assert_allclose(together, expected, rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (gradient, expected_gradient)), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def test_training_overfits_one_batch(tiny):
    loss, params = tiny
    config = OptimizerConfig(learning_rate=3e-2, warmup_steps=1, decay_steps=1000)
    schedule = make_schedule(config, 1000)
    optimizer = make_optimizer(config, schedule)
    step = make_train_step(loss, optimizer, schedule)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer)
    batch = random_batch(0, 2, 16)
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(np.log(257), abs=0.3)
    assert losses[-1] < 0.2 * losses[0]


def test_rounding_the_matrices_once_changes_nothing():
    low = MDNForCausalLM(
        MDNConfig(**TINY_MODEL), implementation="scan", dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    loss, params = split_model(low)
    once = rounded(params, jnp.bfloat16)
    names = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, x in jax.tree_util.tree_leaves_with_path(once)
        if x.dtype == jnp.bfloat16
    }
    mixer = {f"layers.0.mixer.{x}_proj.kernel" for x in "qkvgo"}
    gates = {f"layers.0.mixer.gates.{x}_proj" for x in "abme"}
    assert names == mixer | gates | {
        f"layers.0.mlp.{x}_proj.kernel" for x in ("gate", "up", "down")
    }
    run = jax.jit(jax.value_and_grad(loss))
    batch = random_batch(0, 2, 16)
    (value, gradients), (expected, expected_gradients) = run(once, batch), run(params, batch)
    assert value == expected
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
    assert_identical(wide, expected_gradients)


def test_the_step_lowers_for_a_tpu():
    """Nothing in it is for one kind of device."""
    model = MDNForCausalLM(
        MDNConfig(**TINY_MODEL), implementation="xla", dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    loss, params = split_model(model)
    step = make_train_step(loss, OPTIMIZER, SCHEDULE)
    state, batch = jax.eval_shape(lambda: init_state(params, OPTIMIZER)), random_batch(0, 2, 16)
    text = jax.jit(step).trace(state, batch).lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.dot_general" in text
