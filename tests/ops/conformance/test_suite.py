"""The suite itself: a right implementation passes, and each fault is found by its check."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.testing import conformance_checks

scan = partial(momentum_delta_rule, implementation="scan")


def sees_other_documents(*, segment_ids=None, **inputs):
    return scan(**inputs)


def decays_wrong(*, log_mu, **inputs):
    return scan(log_mu=1.001 * log_mu, **inputs)


def sees_later_steps(*, v, **inputs):
    return scan(v=v + 1e-6 * jnp.roll(v, -1, axis=1), **inputs)


def sees_other_rows(*, v, **inputs):
    return scan(v=v + 1e-3 * jnp.arange(v.shape[0], dtype=v.dtype)[:, None, None, None], **inputs)


def forgets_state(*, initial_state=None, **inputs):
    return scan(**inputs)


def keeps_no_gradient(*, k, **inputs):
    return scan(k=jax.lax.stop_gradient(k), **inputs)


def spreads_nan(*, v, **inputs):
    return scan(v=v + 0 * v.sum(axis=1, keepdims=True), **inputs)


def returns_half(**inputs):
    o, state = scan(**inputs)
    return o, MDNState(state.s.astype(jnp.bfloat16), state.m)


def decays_when_idle(*, log_alpha, **inputs):
    return scan(log_alpha=log_alpha - 1e-6, **inputs)


def fails_on_zero_gates(*, log_alpha, **inputs):
    return scan(log_alpha=jnp.log(jnp.exp(log_alpha)), **inputs)


FAULTS = {
    decays_wrong: {"every_regime", "packed_and_grouped"},
    sees_other_documents: {"packed_and_grouped", "no_leak", "bad_values"},
    sees_later_steps: {"causal"},
    sees_other_rows: {"other_orders"},
    forgets_state: {"pieces", "idle_steps"},
    keeps_no_gradient: {"every_regime", "causal"},
    spreads_nan: {"bad_values", "bad_cotangents"},
    returns_half: {"every_regime"},
    decays_when_idle: {"idle_steps"},
    fails_on_zero_gates: {"gates_of_zero"},
}


def small(rule, names):
    checks = conformance_checks(rule, chunk=4, key_dim=4, value_dim=4, odd_dims=(3, 5))
    chosen = {x.name: x for x in checks if x.name in names}
    assert set(chosen) == names
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("rule", FAULTS, ids=lambda x: x.__name__)
def test_a_fault_is_found(rule):
    for name, check in small(rule, FAULTS[rule]).items():
        assert check.problems(), name


def test_a_check_says_what_was_expected_and_what_came():
    (check,) = small(sees_later_steps, {"causal"}).values()
    with pytest.raises(AssertionError, match="float32-causal: Later steps change no bit") as raised:
        check()
    assert "o: expected the same bits, got" in str(raised.value)
    assert "expected 0 after step 4, got" in str(raised.value)


def test_what_an_implementation_does_not_take_is_not_asked():
    names = {str(x) for x in conformance_checks(scan, dtypes=("bfloat16",), gradients=False)}
    assert "bfloat16-every_regime" in names
    assert not any("cotangents" in name for name in names)
    names = {str(x) for x in conformance_checks(scan, dtypes=("float64", "bfloat16"))}
    assert "float64-pieces" in names
    assert "bfloat16-pieces" not in names
    assert "float64-under_x64" not in names
