"""The decode kernels, both languages, in their interpreters against the scan."""

import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.momentum_delta
from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.ops import api
from mdn_jax.testing import GATE_REGIMES, random_inputs, relative_errors
from pallas_kernels.momentum_delta import call
from pallas_kernels.tiling import DecodeTiles

pytest.importorskip("triton", reason="the development version is for x86-64 Linux")
from tests.kernels.triton_interpreter import interpreted_triton_call

small_inputs = partial(
    random_inputs, batch=2, heads=1, value_heads=2, key_dim=32, value_dim=16, length=3
)


@pytest.fixture(params=["pallas_triton", "triton"])
def decode(request, monkeypatch):
    """`momentum_delta_rule` by either kernel, as on a GPU of compute capability 9.0."""
    interpreted = partial(pallas_kernels.momentum_delta.momentum_delta, interpret=True)
    monkeypatch.setattr(pallas_kernels.momentum_delta, "momentum_delta", interpreted)
    monkeypatch.setattr(api, "_capability", lambda: (9, 0))
    jax_triton = ModuleType("jax_triton")  # cannot be imported where there is no GPU
    jax_triton.__spec__ = ModuleSpec("jax_triton", None)
    jax_triton.triton_call = interpreted_triton_call
    monkeypatch.setitem(sys.modules, "jax_triton", jax_triton)
    return partial(momentum_delta_rule, implementation=request.param)


def assert_matches_scan(decode, inputs, tolerance=1e-6, **options):
    expected = momentum_delta_rule(**inputs, implementation="scan", **options)
    errors = relative_errors(decode(**inputs, **options), expected)
    assert max(errors.values()) <= tolerance, errors


@pytest.mark.parametrize("regime", GATE_REGIMES)
def test_matches_scan_in_every_regime(decode, regime):
    assert_matches_scan(decode, small_inputs(seed=1, regime=regime))


@pytest.mark.parametrize("length", [1, 2, 16])
def test_lengths(decode, length):
    assert_matches_scan(decode, small_inputs(seed=length, length=length))


@pytest.mark.parametrize("p_heads", [1, 2])
def test_explicit_p(decode, p_heads):
    inputs = small_inputs(seed=2, explicit_p=True)
    if p_heads == 2:
        inputs["p"] = jnp.concatenate([inputs["p"], -0.5 * inputs["p"]], axis=2)
    assert_matches_scan(decode, inputs)


def test_documents(decode):
    assert_matches_scan(decode, small_inputs(seed=3, length=8, documents=4, explicit_p=True))
    assert_matches_scan(decode, small_inputs(seed=3, length=8, documents=4))


def test_options_and_no_initial_state(decode):
    inputs = small_inputs(seed=4, initial_state=False)
    assert_matches_scan(decode, inputs, normalize_qk=False, scale=0.7)


def test_dims_that_need_padding(decode):
    assert_matches_scan(decode, small_inputs(seed=5, key_dim=24, value_dim=40))


@pytest.mark.parametrize("block_v", [16, 32])
def test_several_blocks_of_v(decode, block_v, monkeypatch):
    monkeypatch.setattr(call, "decode_tiles", lambda *_: DecodeTiles(block_v, 1))
    assert_matches_scan(decode, small_inputs(seed=6, value_dim=64, length=2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(decode, dtype):
    """Float32 arithmetic on the rounded inputs: the states are exact to float32."""
    inputs = small_inputs(seed=8, dtype=dtype, explicit_p=True)
    o, state = decode(**inputs)
    expected, exact = momentum_delta_rule(**inputs, implementation="scan")
    assert o.dtype == dtype
    assert max(relative_errors(state, exact).values()) <= 1e-6
    # Triton's interpreter cuts float32 to bfloat16 where GPUs round
    assert max(relative_errors(o, expected).values()) <= 4e-3


def test_gates_of_zero_leave_the_states_as_they_are(decode):
    """What generation relies on for rows that have ended: bit for bit."""
    inputs = small_inputs(seed=9)
    for name in ("log_alpha", "log_mu", "beta", "eta"):
        inputs[name] = jnp.zeros_like(inputs[name])
    _, state = decode(**inputs)
    jax.tree.map(np.testing.assert_array_equal, state, MDNState(*inputs["initial_state"]))


def test_steps_in_one_call_or_several(decode):
    inputs = small_inputs(seed=10, length=5)
    o, state = decode(**inputs)
    before = {name: x for name, x in inputs.items() if name != "initial_state"}
    carried, outputs = inputs["initial_state"], []
    for start, stop in ((0, 1), (1, 4), (4, 5)):
        piece = {name: x[:, start:stop] for name, x in before.items()}
        one, carried = decode(**piece, initial_state=carried)
        outputs.append(one)
    pieces = jnp.concatenate(outputs, axis=1), carried
    assert max(relative_errors(pieces, (o, state)).values()) <= 1e-6


def test_gradients(decode):
    inputs = small_inputs(seed=11, batch=1, length=3, key_dim=16, value_dim=16)

    def loss(rule, inputs):
        o, state = rule(**inputs)
        return jnp.sum(jnp.sin(o)) + jnp.sum(state.s * state.m)

    scan = partial(momentum_delta_rule, implementation="scan")
    actual, expected = (jax.grad(partial(loss, rule))(inputs) for rule in (decode, scan))
    assert max(relative_errors(actual, expected).values()) <= 2e-5


def test_under_jit_and_in_a_loop(decode):
    inputs = small_inputs(seed=12)
    per_step = {name: x for name, x in inputs.items() if name != "initial_state"}

    @jax.jit
    def run(per_step, state):
        def step(state, x):
            o, state = decode(**jax.tree.map(lambda y: y[:, None], x), initial_state=state)
            return state, o[:, 0]

        time_first = jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0), per_step)
        state, o = jax.lax.scan(step, state, time_first)
        return jnp.moveaxis(o, 0, 1), state

    expected = momentum_delta_rule(**inputs, implementation="scan")
    errors = relative_errors(run(per_step, inputs["initial_state"]), expected)
    assert max(errors.values()) <= 1e-6, errors


def test_vmap_of_the_pallas_kernel(decode):
    if decode.keywords["implementation"] == "triton":
        pytest.skip("jax-triton's calls have no batching rule")
    stack = [small_inputs(seed=seed, length=2) for seed in range(2)]
    mapped = jax.vmap(lambda x: decode(**x))(jax.tree.map(lambda *x: jnp.stack(x), *stack))
    looped = jax.tree.map(lambda *x: jnp.stack(x), *(decode(**x) for x in stack))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), mapped, looped)


@pytest.mark.slow
@pytest.mark.parametrize("split", [0, 1, 17])
def test_prefill_and_decoding_are_one_call(decode, split):
    """The first steps by the decode kernel too if they are few, else by the chunk kernels."""
    inputs = random_inputs(seed=13, batch=1, length=19, heads=1, key_dim=16, value_dim=16)
    state = inputs.pop("initial_state")
    expected = momentum_delta_rule(**inputs, initial_state=state, implementation="scan")
    outputs = []
    if split:
        first = {name: x[:, :split] for name, x in inputs.items()}
        o, state = momentum_delta_rule(**first, initial_state=state)
        outputs.append(o)
    for t in range(split, 19):
        one = {name: x[:, t : t + 1] for name, x in inputs.items()}
        o, state = decode(**one, initial_state=state)
        outputs.append(o)
    errors = relative_errors((jnp.concatenate(outputs, axis=1), state), expected)
    assert max(errors.values()) <= 1e-5, errors
