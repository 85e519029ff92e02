"""The guard on gates and states: what it says, and that it changes nothing."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.models import AttentionConfig
from tests.tiny import TINY_MODEL
from tests.train.helpers import assert_identical, random_batch, tiny_config
from train.loop import train
from train.metrics.log import read_metrics
from train.metrics.stability import make_stability
from train.step import split_model

NORMS = ("memory_norm", "momentum_norm")
NAMES = (
    "unstable_heads",
    "growing_heads",
    *NORMS,
    "memory_growth",
    "momentum_growth",
    "fastest_head",
)


BATCH = random_batch(0, rows=3, length=64)  # one shape: a model is compiled once


def build(**changes):
    config = MDNConfig(**TINY_MODEL | {"num_hidden_layers": 2, "num_heads": 2} | changes)
    return MDNForCausalLM(config, implementation="scan", rngs=nnx.Rngs(0))


def measured(model, batch):
    _, params = split_model(model)
    return {k: v.item() for k, v in make_stability(model)(params, batch).items()}


def test_a_new_model_is_stable_and_the_norms_are_those_of_its_caches():
    model = build()
    metrics = measured(model, BATCH)
    assert metrics.keys() == {f"layers.{i}.{name}" for i in (0, 1) for name in NAMES}
    first_row = jnp.asarray(BATCH["tokens"][:1])  # as one document
    _, cache = nnx.jit(lambda model, x: model(x))(model, first_row)
    for i in (0, 1):
        assert metrics[f"layers.{i}.unstable_heads"] == 0
        for name, state in zip(NORMS, cache[i].state, strict=True):
            norm = np.linalg.norm(np.asarray(state[0]).reshape(2, -1), axis=1).mean()
            assert metrics[f"layers.{i}.{name}"] == pytest.approx(norm, rel=1e-4)


def spoil(gates, head):
    """Steps of one head outside of the stable region: alpha near 0, p = k, beta eta near 2."""
    e_proj, b_proj = (gates.e_proj[...], gates.b_proj[...])
    if gates.log_factor is not None:
        gates.log_factor[...] = gates.log_factor[...].at[head].set(5.0)
    gates.e_proj[...] = e_proj.at[:, head].set(40 * jnp.sign(e_proj[:, head]))
    gates.b_proj[...] = b_proj.at[:, head].set(gates.e_proj[:, head])


def test_a_head_outside_of_the_region_is_counted_in_its_layer():
    model = build(use_p_times_alpha=False)
    spoil(model.layers[1].mixer.gates, head=0)
    metrics = measured(model, BATCH)
    assert metrics["layers.0.unstable_heads"] == 0
    assert metrics["layers.1.unstable_heads"] == 0.5
    model = build(use_p_times_alpha=True)  # the same gates: alpha in the erase key saves them
    spoil(model.layers[1].mixer.gates, head=0)
    assert measured(model, BATCH)["layers.1.unstable_heads"] == 0
    model = build(use_p_times_alpha=False, bound="stable")  # which keeps within the region itself
    spoil(model.layers[1].mixer.gates, head=0)
    assert measured(model, BATCH)["layers.1.unstable_heads"] == 0


def test_the_head_that_grows_fastest_is_named():
    model = build(use_p_times_alpha=False)
    metrics = measured(model, BATCH)
    for i in (0, 1):
        assert 0 < metrics[f"layers.{i}.memory_growth"] < 4
    gates = model.layers[1].mixer.gates
    gates.b_proj[...] = gates.b_proj[...].at[0, 1].set(jnp.nan)
    metrics = measured(model, BATCH)
    assert metrics["layers.1.fastest_head"] == 1
    assert metrics["layers.1.memory_growth"] == np.inf
    assert metrics["layers.0.memory_growth"] < 4


def test_a_state_that_explodes_is_counted():
    model = build(num_hidden_layers=1, use_p_times_alpha=False, use_short_conv=False, num_heads=1)
    mixer = model.layers[0].mixer
    # the same key at every step, and gates that overshoot: S -> about -1.7 S along it
    mixer.k_proj.kernel[...] = jnp.abs(mixer.k_proj.kernel[...])
    model.embeddings[...] = jnp.ones_like(model.embeddings[...])
    gates = mixer.gates
    gates.log_factor[...] = jnp.full_like(gates.log_factor[...], 5.0)
    gates.e_proj[...] = jnp.full_like(gates.e_proj[...], 4.0)
    gates.b_proj[...] = jnp.full_like(gates.b_proj[...], 4.0)
    metrics = measured(model, BATCH)
    assert metrics["layers.0.unstable_heads"] == 1
    assert metrics["layers.0.growing_heads"] == 1
    assert metrics["layers.0.memory_growth"] > 4
    gates.e_proj[...] = jnp.zeros_like(gates.e_proj[...])
    metrics = measured(model, BATCH)
    assert metrics["layers.0.unstable_heads"] == 0
    assert metrics["layers.0.growing_heads"] == 0


def test_nan_is_neither_stable_nor_bounded():
    model = build()
    model.layers[1].mixer.gates.a_log[...] = jnp.full(2, jnp.nan)
    metrics = measured(model, BATCH)
    assert [metrics[f"layers.{i}.{name}"] for i in (0, 1) for name in NAMES[:2]][2:] == [1, 1]
    assert metrics["layers.0.unstable_heads"] == 0


def test_layers_of_softmax_attention_have_no_gates():
    model = build(attn=AttentionConfig(layers=(0,), num_heads=2))
    metrics = measured(model, BATCH)
    assert metrics.keys() == {f"layers.1.{name}" for name in NAMES}


@pytest.mark.slow
def test_a_run_logs_it_and_is_otherwise_the_same(corpus, tmp_path):
    short = {"eval_every": 6, "checkpoint_every": 6, "sample_tokens": 0}
    plain = train(tiny_config(corpus, tmp_path / "plain", **short))
    config = tiny_config(corpus, tmp_path / "guarded", stability_every=2, **short)
    guarded = train(config)
    assert_identical(guarded.state, plain.state)
    records = read_metrics(config.directory / "metrics.jsonl")
    lines = [r for r in records if "layers.0.growing_heads" in r]
    assert [r["step"] for r in lines] == [2, 4, 6]
    for line in lines:
        assert line.keys() == {"step", *(f"layers.0.{name}" for name in NAMES)}
        assert line["layers.0.unstable_heads"] == 0
        assert line["layers.0.memory_norm"] > 0
    with pytest.raises(ValueError, match="stability_every: expected an int >= 0, got -1"):
        dataclasses.replace(config, stability_every=-1)
