"""Every implementation against the scan, in float64, in every gate regime."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdn_jax import momentum_delta_rule
from mdn_jax.testing import GATE_REGIMES, random_inputs, relative_errors
from tests.ops.helpers import outputs_and_gradients

LENGTHS = (1, 2, 15, 63, 64, 65, 127, 200)


def assert_matches_scan(inputs, tolerance, **options):
    expected = outputs_and_gradients(inputs, implementation="scan")
    actual = outputs_and_gradients(inputs, implementation="xla", **options)
    errors = relative_errors(actual, expected)
    assert max(errors.values()) <= tolerance, errors


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
def test_float64_matches_scan_in_every_regime(length, x64):
    for seed, regime in enumerate(GATE_REGIMES):
        for keys in ("random", "parallel", "zero"):
            inputs = random_inputs(
                seed=seed, length=length, regime=regime, keys=keys, dtype="float64"
            )
            assert_matches_scan(inputs, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("explicit_p", [False, True])
@pytest.mark.parametrize("chunk_size", [16, 50])
def test_float64_matches_scan_packed_and_grouped(chunk_size, explicit_p, x64):
    for seed, regime in enumerate(GATE_REGIMES):
        inputs = random_inputs(
            seed=seed,
            length=130,
            value_heads=4,
            regime=regime,
            dtype="float64",
            explicit_p=explicit_p,
            documents=5,
        )
        assert_matches_scan(inputs, 1e-10, chunk_size=chunk_size)


@pytest.mark.parametrize("regime", GATE_REGIMES)
def test_float32_stays_near_float32_precision(regime):
    """The published coefficients are off by 1e-2 to nan in several of these regimes."""
    inputs = random_inputs(seed=3, length=200, regime=regime)
    assert_matches_scan(inputs, 2e-5)


def test_value_head_p_equals_repeated_key_head_p(x64):
    inputs = random_inputs(seed=0, value_heads=4, dtype="float64", explicit_p=True)
    repeated = inputs | {"p": jnp.repeat(inputs["p"], 2, axis=2)}
    for implementation in ("scan", "xla"):
        shared = momentum_delta_rule(**inputs, implementation=implementation)
        apart = momentum_delta_rule(**repeated, implementation=implementation)
        assert max(relative_errors(apart, shared).values()) <= 1e-14


def test_default_p_is_alpha_times_the_normalised_key(x64):
    inputs = random_inputs(seed=1, dtype="float64")
    k = inputs["k"] / np.sqrt((np.asarray(inputs["k"]) ** 2).sum(-1, keepdims=True) + 1e-6)
    p = np.exp(inputs["log_alpha"])[..., None] * k
    for implementation in ("scan", "xla"):
        default = momentum_delta_rule(**inputs, implementation=implementation)
        explicit = momentum_delta_rule(**inputs, p=jnp.asarray(p), implementation=implementation)
        assert max(relative_errors(explicit, default).values()) <= 1e-12


@pytest.mark.parametrize("implementation", ["scan", "xla"])
def test_gates_of_exactly_zero(implementation):
    """log alpha = log mu = -inf is a gate of zero: finite outputs and gradients."""
    inputs = random_inputs(seed=2, length=40, initial_state=True)
    for name in ("log_alpha", "log_mu"):
        inputs[name] = inputs[name].at[:, ::3].set(-jnp.inf)
    outputs, gradients = outputs_and_gradients(inputs, implementation=implementation)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((outputs, gradients)))
    if implementation == "xla":
        assert_matches_scan(inputs, 2e-5)
