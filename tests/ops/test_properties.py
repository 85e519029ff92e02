"""What must hold whatever the data: splitting, packing, grouping, permuting."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.testing import GATE_REGIMES, random_inputs, relative_error, relative_errors
from tests.ops.helpers import cotangents, outputs_and_gradients

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["scan", "xla"])
STEPWISE = ("q", "k", "v", "log_alpha", "log_mu", "beta", "eta", "p", "segment_ids")


def steps(inputs, start, stop):
    """The call restricted to steps [start, stop), without its initial state."""
    return {name: inputs[name][:, start:stop] for name in STEPWISE if name in inputs}


@cache
def rule(implementation):
    return jax.jit(partial(momentum_delta_rule, implementation=implementation))


@pytest.mark.slow
@IMPLEMENTATIONS
@given(
    seed=st.integers(0, 2**16),
    cut=st.sampled_from([1, 32, 45, 89]),  # each a compilation
    regime=st.sampled_from(sorted(GATE_REGIMES)),
    documents=st.integers(2, 5),
)
def test_split_and_carry_equals_one_call(implementation, seed, cut, regime, documents):
    with jax.enable_x64(True):
        inputs = random_inputs(
            seed=seed, length=90, regime=regime, dtype="float64", documents=documents
        )
        # a document that starts right at the cut is continued by the carry: let none do
        ids = inputs["segment_ids"]
        jump = ids[:, cut : cut + 1] - ids[:, cut - 1 : cut]
        inputs["segment_ids"] = ids.at[:, cut:].add(-jump)
        whole, state = rule(implementation)(**inputs)
        head, carried = rule(implementation)(
            **steps(inputs, 0, cut), initial_state=inputs["initial_state"]
        )
        tail, last = rule(implementation)(**steps(inputs, cut, 90), initial_state=carried)
        assert relative_error(jnp.concatenate([head, tail], axis=1), whole) <= 1e-12
        assert max(relative_errors(last, state).values()) <= 1e-12


@pytest.mark.slow
@IMPLEMENTATIONS
@given(
    seed=st.integers(0, 2**16),
    cut=st.sampled_from([1, 33]),  # each two compilations of the gradient
    regime=st.sampled_from(sorted(GATE_REGIMES)),
)
def test_packed_documents_equal_each_alone(implementation, seed, cut, regime):
    with jax.enable_x64(True):
        length = 60
        inputs = random_inputs(
            seed=seed,
            batch=1,
            length=length,
            value_heads=4,
            regime=regime,
            dtype="float64",
            explicit_p=True,
        )
        inputs["segment_ids"] = jnp.asarray((np.arange(length) >= cut)[None] * 7, jnp.int32)
        ct_o, ct_state = cotangents(inputs)
        packed, gradients = outputs_and_gradients(
            inputs, (ct_o, ct_state), implementation=implementation
        )
        zeros = MDNState(*(jnp.zeros_like(x) for x in ct_state))
        first = steps(inputs, 0, cut) | {"initial_state": inputs["initial_state"]}
        second = steps(inputs, cut, length) | {"initial_state": zeros}
        for part in (first, second):
            del part["segment_ids"]
        (o_1, _), g_1 = outputs_and_gradients(
            first, (ct_o[:, :cut], zeros), implementation=implementation
        )
        (o_2, state_2), g_2 = outputs_and_gradients(
            second, (ct_o[:, cut:], ct_state), implementation=implementation
        )
        alone = (jnp.concatenate([o_1, o_2], axis=1), state_2)
        assert max(relative_errors(packed, alone).values()) <= 1e-12
        del g_2["initial_state"]
        expected = {name: jnp.concatenate([g_1[name], g_2[name]], axis=1) for name in g_2}
        expected["initial_state"] = g_1["initial_state"]
        errors = relative_errors(gradients, expected)
        assert max(errors.values()) <= 1e-11, errors


@IMPLEMENTATIONS
def test_no_gradient_crosses_a_boundary(implementation):
    """Exactly zero, not just small."""
    inputs = random_inputs(seed=6, length=50)
    inputs["segment_ids"] = jnp.asarray(np.arange(50) >= 20, jnp.int32)[None].repeat(2, 0)
    ct_o, ct_state = cotangents(inputs)
    ct_o = ct_o.at[:, :20].set(0)  # only the second document is asked about
    _, gradients = outputs_and_gradients(inputs, (ct_o, ct_state), implementation=implementation)
    for name, gradient in gradients.items():
        if name == "initial_state":
            assert all(not np.asarray(x).any() for x in gradient)
        else:
            assert not np.asarray(gradient)[:, :20].any(), name
            assert np.asarray(gradient)[:, 20:].any(), name
    for name in ("log_alpha", "log_mu"):
        assert not np.asarray(gradients[name])[:, 20].any(), name


@IMPLEMENTATIONS
def test_grouped_heads_equal_repeated_heads(implementation, x64):
    inputs = random_inputs(seed=7, value_heads=6, dtype="float64", explicit_p=True)
    repeated = inputs | {name: jnp.repeat(inputs[name], 3, axis=2) for name in ("q", "k", "p")}
    grouped = outputs_and_gradients(inputs, implementation=implementation)
    apart, gradients = outputs_and_gradients(repeated, implementation=implementation)
    for name in ("q", "k", "p"):
        g = gradients[name]
        gradients[name] = g.reshape(*g.shape[:2], 2, 3, -1).sum(3)
    assert max(relative_errors((apart, gradients), grouped).values()) <= 1e-12


@IMPLEMENTATIONS
@given(order=st.permutations(range(4)))
def test_permuting_the_batch_permutes_the_result(implementation, order):
    inputs = random_inputs(seed=8, batch=4, length=33, documents=3)
    order = np.asarray(order)
    permuted = jax.tree.map(lambda x: x[order], inputs)
    o, state = momentum_delta_rule(**inputs, implementation=implementation)
    o_permuted, state_permuted = momentum_delta_rule(**permuted, implementation=implementation)
    expected = jax.tree.map(lambda x: x[order], (o, state))
    assert max(relative_errors((o_permuted, state_permuted), expected).values()) <= 1e-6


@IMPLEMENTATIONS
def test_causal(implementation):
    inputs = random_inputs(seed=9, length=70)
    cotangent = jax.tree.map(jnp.zeros_like, cotangents(inputs))
    cotangent = (cotangent[0].at[:, 30].set(1.0), cotangent[1])
    _, gradients = outputs_and_gradients(inputs, cotangent, implementation=implementation)
    for name in ("q", "k", "v", "log_alpha", "log_mu", "beta", "eta"):
        assert not np.asarray(gradients[name])[:, 31:].any(), name
        assert np.asarray(gradients[name])[:, :31].any(), name


def test_length_never_changes_the_arithmetic():
    """Steps one at a time through the state equal one long call, for every split of it."""
    inputs = random_inputs(seed=10, length=40)
    whole, state = momentum_delta_rule(**inputs, implementation="xla")
    carry, parts = inputs["initial_state"], []
    one = jax.jit(lambda x, s: momentum_delta_rule(**x, initial_state=s, implementation="xla"))
    for t in range(40):
        o, carry = one(steps(inputs, t, t + 1), carry)
        parts.append(o)
    assert relative_error(jnp.concatenate(parts, axis=1), whole) <= 1e-5
    assert max(relative_errors(carry, state).values()) <= 1e-5
