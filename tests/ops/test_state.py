"""States in 16 bits: what is lost, and that a call loses nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.ops.state import STATE_DTYPES, CompactState, full, keep, kept_as
from mdn_jax.testing import random_inputs, relative_errors

DIGITS = {"bfloat16": 2.0**-8, "float16_scaled": 2.0**-11}


def states(seed=0, sizes=(2, 3, 16, 24)):
    rng = np.random.default_rng(seed)
    return MDNState(*(jnp.asarray(rng.normal(size=sizes), jnp.float32) for _ in range(2)))


@pytest.mark.parametrize("dtype", STATE_DTYPES)
def test_what_keeping_loses(dtype):
    state = states()
    again = full(keep(state, dtype))
    for x, y in zip(again, state, strict=True):
        error = np.abs(np.asarray(x - y)) / np.abs(np.asarray(y))
        assert error.max() <= DIGITS.get(dtype, 0.0)
    assert kept_as(keep(state, dtype)) == dtype


def test_columns_of_any_size_keep_their_digits():
    """float16 by itself ends at 65,504 and at 6e-8."""
    size = jnp.asarray(2.0 ** np.linspace(-60, 60, 24), jnp.float32)
    state = jax.tree.map(lambda x: x * size, states())
    again = full(keep(state, "float16_scaled"))
    for x, y in zip(again, state, strict=True):
        error = np.linalg.norm(np.asarray(x - y), axis=2) / np.linalg.norm(np.asarray(y), axis=2)
        assert error.max() <= DIGITS["float16_scaled"]


def test_zeros_and_what_is_not_finite():
    zero = MDNState.zeros(1, 1, 16, 16)
    assert all(not x.any() for x in full(keep(zero, "float16_scaled")))
    broken = zero._replace(s=zero.s.at[0, 0, 3, 5].set(jnp.nan).at[0, 0, 2, 7].set(jnp.inf))
    again = full(keep(broken, "float16_scaled")).s
    assert np.isfinite(np.asarray(again)).sum() == again.size - 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16_scaled"])
@pytest.mark.parametrize("length", [1, 5])
def test_a_call_computes_in_float32(dtype, length):
    inputs = random_inputs(seed=1, length=length, heads=1, value_heads=2, key_dim=16, value_dim=24)
    kept = keep(inputs.pop("initial_state"), dtype)
    o, after = momentum_delta_rule(**inputs, initial_state=kept, implementation="xla")
    expected = momentum_delta_rule(**inputs, initial_state=full(kept), implementation="xla")
    assert max(relative_errors(o, expected[0]).values()) <= 1e-6
    assert isinstance(after, CompactState)
    jax.tree.map(np.testing.assert_array_equal, after, keep(expected[1], dtype))


@pytest.mark.parametrize(
    ("state", "kind", "words"),
    [
        (lambda x: keep(x, "float16"), ValueError, "state_dtype: expected one of float32, "),
        (lambda x: CompactState(*x, None), TypeError, r"initial_state.s: expected bfloat16 \(wi"),
        (
            lambda x: keep(x, "float16_scaled")._replace(scale=jnp.ones((2, 2, 2, 3))),
            ValueError,
            "initial_state.scale: expected shape",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(state, kind, words):
    inputs = random_inputs(seed=1, length=1, value_dim=24)
    with pytest.raises(kind, match=words) as caught:
        momentum_delta_rule(**inputs | {"initial_state": state(inputs["initial_state"])})
    assert "\n" not in str(caught.value)


def test_float64_is_not_kept_in_16_bits():
    with jax.enable_x64(True), pytest.raises(ValueError, match="state_dtype: expected"):
        keep(MDNState.zeros(1, 1, 2, 2, jnp.float64), "bfloat16")
