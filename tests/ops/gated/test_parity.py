"""Every gated rule: the chunk algorithm against the scan, and the scan against plain loops."""

import functools

import jax
import jax.numpy as jnp
import pytest

from mdn_jax import momentum_delta_rule
from mdn_jax.testing import GATE_REGIMES, relative_error, relative_errors
from tests.ops.gated.helpers import RULES, compiled, outputs_and_gradients, random_call
from tests.ops.gated.loops import loops

every_rule = pytest.mark.parametrize("rule", RULES)


def assert_matches_scan(rule, inputs, outputs=1e-10, gradients=1e-9, **options):
    expected = outputs_and_gradients(rule, inputs, implementation="scan")
    actual = outputs_and_gradients(rule, inputs, implementation="xla", **options)
    assert max(relative_errors(actual[0], expected[0]).values()) <= outputs
    errors = relative_errors(actual[1], expected[1])
    assert max(errors.values()) <= gradients, errors


@every_rule
def test_the_scan_is_the_recurrence(rule, x64):
    inputs = random_call(rule, length=11, value_heads=4, documents=3)
    actual = compiled(rule, "scan")(inputs)
    assert max(relative_errors(actual, loops(rule, **inputs)).values()) <= 1e-13


@pytest.mark.slow
@every_rule
def test_float64_matches_scan_in_every_regime(rule, x64):
    for seed, regime in enumerate(GATE_REGIMES):
        for keys in ("random", "parallel", "zero"):
            inputs = random_call(rule, seed=seed, length=150, regime=regime, keys=keys)
            assert_matches_scan(rule, inputs, chunk_size=12)


@pytest.mark.slow
@every_rule
def test_float64_matches_scan_packed_and_grouped(rule, x64):
    for seed, regime in enumerate(GATE_REGIMES):
        inputs = random_call(rule, seed=seed, value_heads=4, regime=regime, documents=5)
        assert_matches_scan(rule, inputs, chunk_size=25)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["gdn", "kda"])
def test_float32(rule):
    """Near float32 precision in every regime, finite where decays are exactly zero."""
    for regime in GATE_REGIMES:
        inputs = random_call(rule, seed=4, regime=regime, dtype="float32")
        assert_matches_scan(rule, inputs, outputs=2e-5, gradients=2e-5)
    inputs["log_alpha"] = inputs["log_alpha"].at[:, ::3].set(-jnp.inf)
    for implementation in ("scan", "xla"):
        results = outputs_and_gradients(rule, inputs, implementation=implementation)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(results))
    assert_matches_scan(rule, inputs, outputs=2e-5, gradients=2e-5)


@every_rule
def test_packed_documents_are_separate_ones(rule, x64):
    inputs = random_call(rule, length=24, batch=1)
    packed = inputs | {"segment_ids": jnp.repeat(jnp.arange(3), 8)[None]}
    o, state = compiled(rule, "xla")(packed)
    for document in range(3):
        own = slice(8 * document, 8 * (document + 1))
        alone = {name: x[:, own] for name, x in inputs.items() if name != "initial_state"}
        alone["initial_state"] = inputs["initial_state"] * (document == 0)
        expected, last = compiled(rule, "xla")(alone)
        assert relative_error(o[:, own], expected) <= 1e-13
    assert relative_error(state, last) <= 1e-13


@every_rule
def test_one_step_after_another_is_one_call(rule, x64):
    inputs = random_call(rule, length=9)
    expected, last = compiled(rule, "xla")(inputs)
    state = inputs.pop("initial_state")
    for t in range(9):
        one = {name: x[:, t : t + 1] for name, x in inputs.items()}
        o, state = compiled(rule, "xla")(one | {"initial_state": state})
        assert relative_error(o[:, 0], expected[:, t]) <= 1e-13
    assert relative_error(state, last) <= 1e-13


@pytest.mark.parametrize("rule", ["gdn", "comba"])
@pytest.mark.parametrize("implementation", ["scan", "xla"])
def test_momentum_off_is_the_gated_delta_rule(rule, implementation, x64):
    inputs = random_call(rule, length=24, value_heads=4, documents=3)
    o, state = compiled(rule, implementation)(inputs)
    zeros = jnp.zeros_like(inputs["initial_state"])
    inputs["initial_state"] = (inputs["initial_state"], zeros)
    momentum = jax.jit(functools.partial(momentum_delta_rule, implementation=implementation))
    for log_mu in (-jnp.inf, -1e4):
        gates = {
            "log_mu": jnp.full_like(inputs["beta"], log_mu),
            "eta": jnp.ones_like(inputs["beta"]),
        }
        ours, pair = momentum(**inputs, **gates)
        assert relative_error(ours, o) <= 1e-13
        assert relative_error(pair.s, state) <= 1e-13


def test_equal_decays_of_all_channels_are_one_of_the_head(x64):
    inputs = random_call("gdn", length=24)
    by_channel = inputs | {
        "log_alpha": jnp.repeat(inputs["log_alpha"][..., None], inputs["k"].shape[-1], axis=-1)
    }
    actual = compiled("kda", "xla")(by_channel)
    expected = compiled("gdn", "xla")(inputs)
    assert max(relative_errors(actual, expected).values()) <= 1e-13


def test_equal_gates_of_all_channels_are_one_step_size(x64):
    """Gated Delta Rule-2 with `b = w = beta` is the rule of Kimi Delta Attention."""
    inputs = random_call("kda", length=24)
    gates = {"b": inputs["k"], "w": inputs["v"]}
    gates = {n: jnp.broadcast_to(inputs["beta"][..., None], x.shape) for n, x in gates.items()}
    by_channel = {name: x for name, x in inputs.items() if name != "beta"} | gates
    actual = compiled("gdn2", "xla")(by_channel)
    expected = compiled("kda", "xla")(inputs)
    assert max(relative_errors(actual, expected).values()) <= 1e-13
