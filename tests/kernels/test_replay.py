"""The kernel of one step with states written every L steps, and states in 16 bits in decoding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.ops import api, kernels
from mdn_jax.ops.replay import fold, replay_state, replay_steps
from mdn_jax.ops.state import full, keep
from mdn_jax.testing import random_inputs, relative_errors
from pallas_kernels import offline_compile
from pallas_kernels.momentum_delta import Memory, Ring, Tokens, replay_step
from pallas_kernels.momentum_delta import api as kernel_api
from pallas_kernels.tiling import DecodeTiles

small = partial(random_inputs, batch=2, heads=1, value_heads=2, key_dim=16, value_dim=32)


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """In the interpreter, as on a GPU of compute capability 9.0; two blocks of V."""
    for name in ("kernel_rule", "kernel_replay"):
        monkeypatch.setattr(kernels, name, partial(getattr(kernels, name), interpret=True))
    monkeypatch.setattr(api, "_capability", lambda: (9, 0))
    monkeypatch.setattr(kernel_api, "decode_tiles", lambda *_: DecodeTiles(16, 1))


@pytest.mark.parametrize("explicit_p", [False, True])
def test_the_definition(explicit_p):
    """Shared keys, two writes; gates of zero start a document, which sees nothing, nan included."""
    inputs = small(seed=0, length=13, explicit_p=explicit_p)
    state = inputs.pop("initial_state")
    inputs["v"] = inputs["v"].at[0, 5].set(jnp.nan)
    ids = jnp.zeros((2, 13), jnp.int32).at[0, 6:].set(1)
    expected = momentum_delta_rule(
        **inputs, initial_state=state, segment_ids=ids, implementation="scan"
    )
    for gate in ("log_alpha", "log_mu"):
        inputs[gate] = inputs[gate].at[0, 6].set(-jnp.inf)
    if explicit_p:
        inputs["p"] = inputs["p"].at[0, 6].set(0.0)
    run = jax.jit(partial(replay_steps, implementation="pallas_triton"))
    o, after = run(**inputs, initial_state=replay_state(state, 4, heads=1))
    assert np.isnan(o[0, 5]).all()
    assert np.isnan(expected[0][0, 5]).all()
    errors = relative_errors(
        (o.at[0, 5].set(0.0), fold(after)), (expected[0].at[0, 5].set(0.0), expected[1])
    )
    assert max(errors.values()) <= 1e-6, errors


@pytest.mark.parametrize("dtype", ["bfloat16", "float16_scaled"])
def test_states_of_16_bits(dtype):
    inputs = small(seed=1, length=9, dtype="bfloat16")
    kept = keep(inputs.pop("initial_state"), dtype)
    state = replay_state(kept, 4, heads=1, dtype="bfloat16")
    run = jax.jit(replay_steps, static_argnames="implementation")
    o, after = run(**inputs, initial_state=state, implementation="pallas_triton")
    expected, same = run(**inputs, initial_state=state, implementation="xla")
    assert max(relative_errors(o, expected).values()) <= 4e-3
    assert max(relative_errors(full(after.base), full(same.base)).values()) <= 1e-4
    np.testing.assert_array_equal(after.counts, same.counts)


def test_free_slots_are_never_read():
    inputs = small(seed=2, length=5)
    state = replay_state(inputs.pop("initial_state"), 4, heads=1)
    spoiled = state._replace(
        keys=state.keys + jnp.nan, v_new=state.v_new + jnp.nan, gates=state.gates + jnp.nan
    )
    run = jax.jit(partial(replay_steps, implementation="pallas_triton"))
    o, _ = run(**inputs, initial_state=spoiled)
    expected, _ = run(**inputs, initial_state=state)
    np.testing.assert_array_equal(o, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16_scaled"])
@pytest.mark.parametrize("dims", [(16, 32), (12, 20)])
def test_decoding_from_16_bits(dtype, dims):
    """As from the float32 of the same states, and rounded once after all steps."""
    inputs = small(seed=3, length=3, key_dim=dims[0], value_dim=dims[1])
    kept = keep(inputs.pop("initial_state"), dtype)
    rule = partial(momentum_delta_rule, **inputs, implementation="pallas_triton")
    (o, after), expected = jax.jit(rule)(initial_state=kept), rule(initial_state=full(kept))
    np.testing.assert_allclose(o, expected[0], rtol=1e-6, atol=1e-7)
    exact = keep(expected[1], dtype)
    errors = relative_errors(full(after), full(exact))
    assert max(errors.values()) <= 1e-4, errors
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, exact)


def test_no_gradients_of_16_bits():
    inputs = small(seed=4, length=1)
    kept = keep(inputs.pop("initial_state"), "bfloat16")

    def loss(v):
        rule = partial(momentum_delta_rule, **inputs | {"v": v}, implementation="pallas_triton")
        return rule(initial_state=kept)[0].sum()

    with pytest.raises(ValueError, match="initial_state: expected float32 states where a grad"):
        jax.grad(loss)(inputs["v"])


def test_dims_that_need_padding_take_the_portable_path():
    inputs = small(seed=5, length=1, value_dim=20)
    state = replay_state(inputs.pop("initial_state"), 4, heads=1)
    with pytest.raises(ValueError, match="expects K, V such as 16, 32, got 16, 20"):
        replay_steps(**inputs, initial_state=state, implementation="pallas_triton")
    replay_steps(**inputs, initial_state=state)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16_scaled"])
def test_compiles_in_place_without_spills(dtype):
    pytest.importorskip("triton", reason="the development version is for x86-64 Linux")
    per_step = jax.ShapeDtypeStruct((64, 1, 6), jnp.float32)
    keys, values = (jax.ShapeDtypeStruct((64, 1, 6, n), jnp.bfloat16) for n in (128, 256))
    state = jax.eval_shape(
        lambda: replay_state(keep(MDNState.zeros(64, 6, 128, 256), dtype), 8, dtype="bfloat16")
    )
    x = Tokens(keys, keys, values, None, per_step, per_step, per_step, per_step)
    step = partial(replay_step, scale=0.1, normalize=True)
    rows = jax.ShapeDtypeStruct((64, 1), jnp.int32)
    arguments = (x, Memory(*state.base), Ring(*state[1:]), rows)
    kernels = offline_compile.lowered(step, (9, 0), *arguments)
    in_place = {"mdn_replay_plan": 3, "mdn_replay": 3 + (dtype != "float32")}
    assert {kernel.name: kernel.in_place for kernel in kernels} == in_place
    for kernel in kernels:
        report = offline_compile.compile_kernel(kernel, (9, 0))
        assert report.spilled == 0, report
