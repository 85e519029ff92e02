"""Block scaling: what the kernels hand on in float16 keeps its digits, whatever its size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdn_jax import momentum_delta_rule
from mdn_jax.testing import (
    GATE_REGIMES,
    random_cotangents,
    random_inputs,
    relative_error,
    relative_errors,
)
from pallas_kernels.momentum_delta.block_scaling import power_of_two, scale_for
from tests.kernels.helpers import interpreted_rule, kernel_outputs_and_gradients
from tests.ops.helpers import outputs_and_gradients

inputs_of = partial(
    random_inputs, batch=1, heads=1, key_dim=16, value_dim=32, length=130, dtype=jnp.bfloat16
)


def test_powers_of_two():
    sizes = np.float32([1.0, 1.5, 1.99, 2.0, 3e-20, 7e25, 2.0**-120, 2.0**120])
    size, inverse = map(np.asarray, power_of_two(jnp.asarray(sizes)))
    np.testing.assert_array_equal(size * inverse, 1)
    np.testing.assert_array_equal(np.frexp(size)[0], 0.5)
    assert np.all((size <= sizes) & (sizes < 2 * size))


def test_numbers_fill_the_upper_half_of_float16():
    bounds = jnp.asarray(np.float32([1e-30, 1e-3, 0.99, 1, 5e4, 3e30]))
    scale = scale_for(bounds)
    inside = np.asarray(bounds * scale.inverse)
    assert np.all((inside >= 2**13) & (inside < 2**14))
    np.testing.assert_array_equal(inside * np.asarray(scale.size), bounds)


@pytest.mark.parametrize("bound", [0.0, 1e-40])
def test_nothing_has_a_scale_too(bound):
    scale = scale_for(jnp.float32(bound))
    assert float(scale.size) > 0
    assert np.isfinite(float(scale.inverse))


def gradient_errors(inputs):
    """Of the kernels' gradients against the float32 scan's."""
    cotangent = random_cotangents(inputs)
    _, gradients = kernel_outputs_and_gradients(inputs, cotangent)
    _, right = outputs_and_gradients(
        *jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, cotangent)), implementation="scan"
    )
    return relative_errors(gradients, right)


def times(tree, factor):
    return jax.tree.map(lambda x: (x * factor).astype(x.dtype), tree)


@pytest.mark.slow
@pytest.mark.parametrize("exponents", [(40, -60), (-50, 30)])
def test_sizes_of_values_and_cotangents_do_not_matter(exponents):
    """All is linear in them, and powers of two are exact: the same bits, as many doublings off."""
    of_values, of_cotangents = (2.0**x for x in exponents)
    inputs = inputs_of(seed=1)
    cotangent = random_cotangents(inputs)
    outputs, gradients = kernel_outputs_and_gradients(inputs, cotangent)
    large = inputs | times({name: inputs[name] for name in ("v", "initial_state")}, of_values)
    moved = kernel_outputs_and_gradients(large, times(cotangent, of_cotangents))
    jax.tree.map(np.testing.assert_array_equal, moved[0], times(outputs, of_values))
    for name, gradient in gradients.items():
        factor = of_cotangents * (1.0 if name in ("v", "initial_state") else of_values)
        expected = times(gradient, factor)
        jax.tree.map(np.testing.assert_array_equal, moved[1][name], expected)


@pytest.mark.slow
@pytest.mark.parametrize("doublings", [12, 40])
def test_blocks_of_values_of_different_sizes(doublings):
    """What adds up over V has operands in other scales in each block (of 16, the tests' tiles).

    Large values have small cotangents, so that both blocks count in the gradients of q and k.
    """
    inputs = inputs_of(seed=2)
    o, state = random_cotangents(inputs)
    by = jnp.where(jnp.arange(32) < 16, 2.0**doublings, 1.0)
    inputs |= times({name: inputs[name] for name in ("v", "initial_state")}, by)
    cotangent = times((o, state), 1 / by)
    (actual, final), gradients = kernel_outputs_and_gradients(inputs, cotangent)
    expected, right = outputs_and_gradients(
        *jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, cotangent)), implementation="scan"
    )
    errors = relative_errors(gradients, right)
    assert max(errors.values()) <= 1e-2, errors
    for block in (slice(0, 16), slice(16, 32)):
        for x, y in zip((actual, *final), (expected[0], *expected[1]), strict=True):
            assert relative_error(x[..., block], y[..., block]) <= 5e-3
        assert relative_error(gradients["v"][..., block], right["v"][..., block]) <= 1e-2


@pytest.mark.slow
def test_one_large_value_leaves_the_digits_of_the_rest():
    """Forgotten at the next document, but float16 alone would have ended at it."""
    inputs = inputs_of(seed=3, documents=3, initial_state=False)
    inputs["v"] = inputs["v"].at[0, 0, 0, 0].set(2.0**30)
    starts = np.flatnonzero(np.diff(np.asarray(inputs["segment_ids"])[0]))
    after = int(starts[0]) + 1
    o, _ = jax.jit(interpreted_rule)(**inputs)
    expected, _ = momentum_delta_rule(
        **jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, inputs),
        implementation="scan",
    )
    assert relative_error(o[:, after:], expected[:, after:]) <= 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("explicit_p", [False, True])
def test_one_head_in_every_regime(explicit_p):
    """Gradients of gates may all but cancel, and are 2^40 times smaller for a lost momentum."""
    worst = {}
    for seed, regime in enumerate(GATE_REGIMES):
        for keys in ("random", "parallel", "zero"):
            inputs = inputs_of(seed=seed, regime=regime, keys=keys, explicit_p=explicit_p)
            errors = gradient_errors(inputs)
            worst[regime, keys] = max((error, name) for name, error in errors.items())
    assert max(worst.values())[0] <= 1e-2, worst
    assert sorted(worst.values())[len(worst) // 2][0] <= 5e-3, worst


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "limit"), [(jnp.bfloat16, 1e-2), (jnp.float16, 2e-3)])
@pytest.mark.parametrize("explicit_p", [False, True])
def test_short_keys(dtype, limit, explicit_p):
    """Their inverse norms are up to 1000, which times v_new in its scale does not fit float16."""
    inputs = inputs_of(seed=5, explicit_p=explicit_p, dtype=dtype)
    # zeros in place of no state: these programs are those of the test above
    inputs["initial_state"] = times(inputs["initial_state"], 0.0)
    for name in ("q", "k", "p") if explicit_p else ("q", "k"):
        for size in (0.0, 1e-3):
            errors = gradient_errors(inputs | {name: times(inputs[name], size)})
            errors = {x: error for x, error in errors.items() if "initial_state" not in x}
            assert max(errors.values()) <= limit, (name, size, errors)


@pytest.mark.slow
@pytest.mark.parametrize("initial_state", [True, False])
def test_walks_in_halves(initial_state):
    """Scales begin anew with the second half of a walk."""
    inputs = random_inputs(
        seed=4, batch=1, length=130, heads=1, value_heads=2, key_dim=16, value_dim=32,
        dtype=jnp.bfloat16, documents=2, initial_state=initial_state,
    )  # fmt: skip
    whole, cut = (kernel_outputs_and_gradients(inputs, resident=n) for n in (None, 3))
    errors = relative_errors(cut, whole)
    assert max(errors.values()) <= 1e-3, errors
