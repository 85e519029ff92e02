import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.models import AttentionConfig, Mixer
from tests.tiny import TINY_MODEL
from train.config import TrainConfig
from train.config_sections import OptimizerConfig
from train.optimizer import (
    average_of,
    decay_mask,
    group,
    group_norms,
    make_optimizer,
    make_schedule,
    with_average,
)
from train.parallel.sharding import partition
from train.stacking import by_layer, stacked
from train.step import split_model

PUBLISHED = OptimizerConfig()


def test_published_schedule():
    schedule = make_schedule(PUBLISHED, 30_720)
    assert schedule(0) == 0
    assert schedule(512) == pytest.approx(1.5e-4)
    assert schedule(1024) == pytest.approx(3e-4)
    middle = 1024 + (30_720 - 1024) // 2
    assert schedule(middle) == pytest.approx((3e-4 + 3e-5) / 2, rel=1e-5)
    assert schedule(30_720) == pytest.approx(3e-5)
    assert schedule(99_999) == pytest.approx(3e-5)


def test_the_warmup_follows_the_steps():
    for steps, warmup in ((30_720, 1024), (300, 30), (12, 1), (3, 0)):
        assert TrainConfig(steps=steps).optimizer.warmup_steps is None
        schedule = make_schedule(OptimizerConfig(), steps)
        assert schedule(warmup) == pytest.approx(3e-4)
        assert warmup == 0 or schedule(warmup - 1) < 3e-4 * warmup / (warmup + 1)
    assert make_schedule(OptimizerConfig(decay_steps=50), 9999)(5) == pytest.approx(3e-4)


def test_schedule_without_warmup_starts_at_the_peak():
    schedule = make_schedule(OptimizerConfig(warmup_steps=0, decay_steps=10), 999)
    assert schedule(0) == pytest.approx(3e-4)
    assert schedule(10) == pytest.approx(3e-5)


@pytest.mark.parametrize(
    ("schedule", "cooldown", "expected"),
    [
        ("linear", None, {10: 1.0, 55: 0.55, 100: 0.1, 500: 0.1}),
        ("constant", None, {10: 1.0, 100: 1.0, 500: 1.0}),
        ("wsd", None, {10: 1.0, 80: 1.0, 90: 0.55, 100: 0.1, 500: 0.1}),
        ("wsd", 40, {10: 1.0, 60: 1.0, 80: 0.55, 100: 0.1}),
        ("wsd", 90, {10: 1.0, 55: 0.55, 100: 0.1}),
    ],
)
def test_other_schedules(schedule, cooldown, expected):
    config = OptimizerConfig(
        learning_rate=1.0, warmup_steps=10, schedule=schedule, cooldown_steps=cooldown
    )
    rate = make_schedule(config, 100)
    for step, value in ({0: 0.0, 5: 0.5} | expected).items():
        assert rate(step) == pytest.approx(value, rel=1e-6), step


def test_fields_that_do_not_fit_are_named():
    with pytest.raises(
        ValueError, match=r"optimizer\.cooldown_steps: expected None, or an int >= 1"
    ):
        OptimizerConfig(cooldown_steps=10)
    with pytest.raises(
        ValueError, match=r"optimizer\.ema_decay: expected None or a number .*got 1"
    ):
        OptimizerConfig(ema_decay=1.0)
    optimizer = OptimizerConfig(schedule="wsd", cooldown_steps=95, warmup_steps=6)
    with pytest.raises(ValueError, match=r"optimizer\.cooldown_steps: expected at most the 100 "):
        TrainConfig(steps=100, optimizer=optimizer)


@pytest.mark.parametrize("mixer", get_args(Mixer))
def test_every_parameter_of_every_mixer_is_classified_and_cut(mixer):
    check_classified(mixer=mixer, use_lora_gate=mixer in ("kda", "gdn2"))


def test_every_parameter_of_stable_gates_is_classified_and_cut():
    check_classified(bound="stable")


def check_classified(**fields):
    config = MDNConfig(**TINY_MODEL, conv_bias=True, **fields)
    model = nnx.eval_shape(lambda: MDNForCausalLM(config, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    matrices = jax.tree.map(lambda x: len(x.shape) == 2, params)
    assert decay_mask(params) == matrices
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        assert len(partition(path, x)) <= x.ndim


def test_every_parameter_of_a_hybrid_model_is_classified():
    attention = AttentionConfig(layers=(1,), num_heads=2, qkv_bias=True)
    config = MDNConfig(
        **TINY_MODEL | {"num_hidden_layers": 2},
        conv_bias=True,
        use_lora_gate=True,
        attn=attention,
    )
    model = nnx.eval_shape(lambda: MDNForCausalLM(config, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    mask = {
        jax.tree_util.keystr(path, simple=True, separator="."): decays
        for path, decays in jax.tree_util.tree_flatten_with_path(decay_mask(params))[0]
    }
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="."): x.shape
        for path, x in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    gates = {"a_log", "mu_log", "log_factor", "d_log", "dt_bias", "mu_bias"}
    assert gates <= {name.rpartition(".")[2] for name in mask}
    for name, decays in mask.items():
        last = name.rpartition(".")[2]
        exempt = last in gates or "bias" in last or "norm" in name
        assert decays == (not exempt), name
        # nothing with one axis is a matrix, everything with two is
        assert decays == (len(shapes[name]) == 2), name
    for name in (
        "embeddings",
        "lm_head",
        "layers.0.mixer.q_proj.kernel",
        "layers.0.mixer.q_conv1d.kernel",
        "layers.0.mixer.gates.a_proj",
        "layers.0.mlp.up_proj.kernel",
        "layers.1.mixer.k_proj.kernel",
    ):
        assert mask[name], name
    assert not mask["layers.1.mixer.k_proj.bias"]


def test_an_unknown_parameter_needs_a_decision():
    with pytest.raises(KeyError, match=r"layers\.novelty: expected.*DECAYED"):
        decay_mask({"layers": {"novelty": jnp.zeros(3)}})


def test_decay_acts_on_matrices_alone():
    params = {"kernel": jnp.ones((2, 2)), "a_log": jnp.ones(2)}
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=0, decay_steps=10, weight_decay=0.1)
    optimizer = make_optimizer(config, make_schedule(config, 10))
    gradient = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["kernel"], 1 - 0.5 * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(new["a_log"], 1)


def test_first_update_is_clipped_and_of_the_learning_rate():
    params = {"scale": jnp.zeros(2)}
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, decay_steps=10, clip_norm=1.0)
    optimizer = make_optimizer(config, make_schedule(config, 10))
    updates, state = optimizer.update(
        {"scale": jnp.array([300.0, -400.0])}, optimizer.init(params), params
    )
    np.testing.assert_allclose(updates["scale"], [-0.1, 0.1], rtol=1e-5)
    first_moment = optax.tree.get(state, "mu")["scale"]
    np.testing.assert_allclose(first_moment, 0.1 * np.array([0.6, -0.8]), rtol=1e-5)


def one_update(config, params, gradient):
    optimizer = make_optimizer(config, make_schedule(config, 10))
    return jax.jit(lambda: optimizer.update(gradient, optimizer.init(params), params)[0])()


def test_muon_is_for_the_matrices_of_layers_each_by_itself():
    draw = np.random.default_rng(0).normal
    layers = {
        i: {"q_proj": {"kernel": jnp.float32(draw(size=(6, 4)))}, "scale": jnp.ones(3)}
        for i in range(2)
    }
    params = {"embeddings": jnp.float32(draw(size=(6, 4))), "layers": layers}
    gradient = jax.tree.map(lambda x: jnp.float32(draw(size=x.shape)), params)
    config = OptimizerConfig(
        name="muon", learning_rate=0.1, warmup_steps=0, clip_norm=1e9, weight_decay=0.0
    )
    plain = dataclasses.replace(config, name="adamw")
    updates = one_update(config, params, gradient)
    groups = ((0, 1),)
    again = by_layer(one_update(config, stacked(params, groups), stacked(gradient, groups)))
    others = one_update(plain, params, gradient)
    np.testing.assert_array_equal(updates["embeddings"], others["embeddings"])
    for i in range(2):
        ours, same, adamw = (x["layers"][i] for x in (updates, again, others))
        np.testing.assert_array_equal(ours["scale"], adamw["scale"])
        kernel = ours["q_proj"]["kernel"]
        np.testing.assert_allclose(same["q_proj"]["kernel"], kernel, rtol=1e-4, atol=1e-6)
        # orthogonal up to the iteration's accuracy, of the size of AdamW's
        lengths = np.linalg.svd(kernel, compute_uv=False) / (0.1 * 0.2 * np.sqrt(6))
        assert (lengths > 0.6).all()
        assert (lengths < 1.3).all()


def test_the_average_follows_the_parameters():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, decay_steps=10)
    inner = make_optimizer(config, make_schedule(config, 10))
    frozen = {"scale": False, "bias": True}
    optimizer = with_average(inner, 0.75, frozen)
    params = {"scale": jnp.ones(2), "bias": jnp.full(2, 1e-40)}
    state, expected = optimizer.init(params), np.ones(2)
    for _ in range(2):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
        expected = 0.75 * expected + 0.25 * np.asarray(params["scale"])
    np.testing.assert_allclose(average_of(state)["scale"], expected, rtol=1e-6)
    np.testing.assert_array_equal(average_of(state)["bias"], np.full(2, 1e-40, np.float32))
    assert average_of(inner.init(params)) is None
    assert with_average(inner, None) is inner


def test_every_parameter_of_a_model_has_a_group():
    attention = AttentionConfig(layers=(1,), num_heads=2)
    config = MDNConfig(**TINY_MODEL | {"num_hidden_layers": 2}, attn=attention)
    _, params = split_model(MDNForCausalLM(config, rngs=nnx.Rngs(0)))
    groups = {
        jax.tree_util.keystr(path, simple=True, separator="."): group(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    }
    assert "other" not in groups.values()
    assert groups["layers.0.mixer.gates.a_log"] == groups["layers.0.mixer.d_log"] == "gates"
    assert groups["layers.0.mixer.q_conv1d.kernel"] == "convolutions"
    assert groups["layers.0.mixer.o_norm.scale"] == groups["norm.scale"] == "norms"
    assert groups["layers.1.mixer.q_proj.kernel"] == "projections"
    assert (groups["embeddings"], groups["lm_head"]) == ("embeddings", "head")
    norms = group_norms(params)
    assert set(norms) == set(groups.values())
    total = np.sqrt(sum(float(x) ** 2 for x in norms.values()))
    assert total == pytest.approx(float(optax.tree.norm(params)), rel=1e-5)
    lengths = [np.linalg.norm(params["layers"][i]["mlp"]["up_proj"]["kernel"]) for i in (0, 1)]
    assert norms["mlp"] > max(lengths)
