"""The error that decides, and what a forward pass keeps."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from benchmarks.reference import (
    Worst,
    forward_keeping_states,
    half_a_unit_off,
    scan_outputs_and_gradients,
    worst,
)
from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.testing import LIMITS, Limits, random_cotangents, random_inputs, relative_errors

INPUTS = random_inputs(seed=0, batch=1, length=20, heads=1, documents=2)


def test_the_worst_is_named_and_agrees_with_the_library():
    right = jax.jit(scan_outputs_and_gradients)(INPUTS, random_cotangents(INPUTS))
    assert worst(right, right)[::2] == (0, 0)
    (o, state), gradients = right
    changed = gradients | {"initial_state": gradients["initial_state"]._replace(m=state.m)}
    wrong = (o, MDNState(state.s * 1.01, state.m)), changed
    errors = worst(wrong, right)
    assert errors.output_name == "s"
    assert errors.gradient_name == "initial_state.m"
    expected = relative_errors(wrong, right)
    assert errors.output == pytest.approx(expected["0.1.s"], rel=1e-4)
    assert errors.output == pytest.approx(0.01, rel=1e-3)
    assert errors.gradient == pytest.approx(expected["1.initial_state.m"], rel=1e-4)
    on_host = worst(wrong, right, on_host=True)
    assert on_host[1::2] == errors[1::2]
    assert on_host[::2] == pytest.approx(errors[::2], rel=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_a_unit_off_is_within_what_16_bits_round(dtype):
    x = jax.random.normal(jax.random.key(0), (1000,)).astype(dtype)
    given = {"x": x, "gate": jnp.ones(3), "ids": jnp.arange(3)}
    moved = half_a_unit_off(given)
    assert moved["x"].dtype == jnp.float32
    assert jnp.array_equal(moved["x"].astype(dtype), x)
    change = jnp.abs(moved["x"] - x.astype(jnp.float32)) / jnp.abs(x.astype(jnp.float32))
    assert 0.9 < jnp.max(change) / (jnp.finfo(dtype).eps / 4) <= 1.001
    for name in ("gate", "ids"):
        assert jnp.array_equal(moved[name], given[name])
        assert moved[name].dtype == given[name].dtype


def pair(x):
    zero = jnp.zeros(2)
    return (x, MDNState(zero, zero)), {"q": zero}


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([1e-25, 2e-25], [1e-25, 1e-25], 2**-0.5),  # squares that are zero in float32
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1.0, 0.0], [0.0, 0.0], float("inf")),
        ([float("nan"), 0.0], [1.0, 0.0], float("inf")),
        ([1.0, 0.0], [float("nan"), 0.0], float("inf")),
    ],
)
def test_errors_of_special_values(actual, expected, error):
    result = worst(pair(jnp.array(actual)), pair(jnp.array(expected)))
    assert result.output == pytest.approx(error, rel=1e-6)
    assert result.gradient == 0


def test_limits():
    assert Worst(1e-5, "o", 1e-5, "q").within(LIMITS["float32"])
    assert not Worst(float("nan"), "o", 0.0, "q").within(Limits(1, 1))
    assert not Worst(0.0, "o", 2.0, "q").within(Limits(1, 1))


def test_states_kept_for_the_backward_pass():
    inputs = random_inputs(seed=0, batch=1, length=256, heads=1, initial_state=False)
    run = forward_keeping_states(partial(momentum_delta_rule, implementation="xla"))
    outputs, kept = jax.eval_shape(run, inputs)
    assert outputs[0].shape == inputs["v"].shape
    # one pair of states a chunk
    assert sum(x.size for x in kept) >= 2 * 4 * 16 * 24
