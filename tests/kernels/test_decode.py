"""The decode kernels, both languages, under transformations and after the chunk kernels.

Their values are those of tests/ops/conformance.
"""

import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdn_jax import momentum_delta_rule
from mdn_jax.ops import api, kernels
from mdn_jax.testing import random_inputs, relative_errors
from pallas_kernels import backends
from pallas_kernels.momentum_delta import MAX_STEPS
from pallas_kernels.momentum_delta import api as kernel_api
from pallas_kernels.tiling import DecodeTiles

pytest.importorskip("triton", reason="the development version is for x86-64 Linux")
from tests.kernels.triton_interpreter import interpreted_triton_call

small_inputs = partial(
    random_inputs, batch=2, heads=1, value_heads=2, key_dim=32, value_dim=16, length=3
)


@pytest.fixture(params=["pallas_triton", "triton"])
def decode(request, monkeypatch):
    """`momentum_delta_rule` by either kernel, as on a GPU of compute capability 9.0."""
    monkeypatch.setattr(kernels, "kernel_rule", partial(kernels.kernel_rule, interpret=True))
    monkeypatch.setattr(api, "_capability", lambda: (9, 0))
    monkeypatch.setattr(backends, "jax_triton_lacks", lambda: None)
    jax_triton = ModuleType("jax_triton")  # cannot be imported where there is no GPU
    jax_triton.__spec__ = ModuleSpec("jax_triton", None)
    jax_triton.triton_call = interpreted_triton_call
    monkeypatch.setitem(sys.modules, "jax_triton", jax_triton)
    return partial(momentum_delta_rule, implementation=request.param)


def assert_matches_scan(decode, inputs, tolerance=1e-6, **options):
    expected = momentum_delta_rule(**inputs, implementation="scan", **options)
    errors = relative_errors(decode(**inputs, **options), expected)
    assert max(errors.values()) <= tolerance, errors


def test_as_many_steps_as_it_takes(decode):
    assert_matches_scan(decode, small_inputs(seed=16, length=MAX_STEPS))


@pytest.mark.parametrize("block_v", [16, 32])
def test_several_blocks_of_v(decode, block_v, monkeypatch):
    monkeypatch.setattr(kernel_api, "decode_tiles", lambda *_: DecodeTiles(block_v, 1))
    assert_matches_scan(decode, small_inputs(seed=6, value_dim=64, length=2))


def test_gradients(decode):
    inputs = small_inputs(seed=11, batch=1, length=3, key_dim=16, value_dim=16)

    def loss(rule, inputs):
        o, state = rule(**inputs)
        return jnp.sum(jnp.sin(o)) + jnp.sum(state.s * state.m)

    scan = partial(momentum_delta_rule, implementation="scan")
    actual, expected = (jax.jit(jax.grad(partial(loss, rule)))(inputs) for rule in (decode, scan))
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
    step = jax.jit(decode)
    for t in range(split, 19):
        one = {name: x[:, t : t + 1] for name, x in inputs.items()}
        o, state = step(**one, initial_state=state)
        outputs.append(o)
    errors = relative_errors((jnp.concatenate(outputs, axis=1), state), expected)
    assert max(errors.values()) <= 1e-5, errors
