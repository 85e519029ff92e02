"""`momentum_delta_rule` picks the kernels where they can run, and else says why they cannot."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdn_jax import momentum_delta_rule
from mdn_jax.ops import api, kernels
from mdn_jax.testing import random_cotangents, random_inputs, relative_error, relative_errors
from tests.ops.helpers import outputs_and_gradients

INPUTS = random_inputs(
    seed=0, batch=1, length=20, heads=1, value_heads=2, key_dim=16, value_dim=16, documents=2
)


@pytest.fixture
def hopper(monkeypatch):
    """As on a GPU of compute capability 9.0, with the kernels in the interpreter."""
    monkeypatch.setattr(kernels, "kernel_rule", partial(kernels.kernel_rule, interpret=True))
    monkeypatch.setattr(api, "_capability", lambda: (9, 0))


def explain(**change):
    with pytest.raises(ValueError, match="implementation") as raised:
        momentum_delta_rule(**(INPUTS | change), implementation="pallas_triton")
    message = str(raised.value)
    assert 'implementation="xla"' in message
    return message


def test_a_cpu_is_told_what_is_needed_and_what_to_use():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    message = explain()
    assert '"pallas_triton" expects a CUDA GPU' in message
    assert "got none" in message
    momentum_delta_rule(**INPUTS)  # and None picks another


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chunk_size": 32}, ["chunk_size 64", "32"]),
        (random_inputs(seed=1, length=2, key_dim=257), ["K at most 256", "257"]),
        (random_inputs(seed=1, length=2, value_dim=513), ["V at most 512", "513"]),
    ],
)
def test_what_the_kernels_cannot_run(hopper, change, words):
    inputs = INPUTS if "q" not in change else {"segment_ids": None}
    message = explain(**(inputs | change))
    for word in words:
        assert word in message, message


def test_float64_and_a_traced_scale(hopper, x64):
    assert "float64" in explain(**random_inputs(seed=1, dtype="float64"), segment_ids=None)
    with pytest.raises(ValueError, match="scale known when the call is traced"):
        jax.jit(
            lambda scale: momentum_delta_rule(**INPUTS, scale=scale, implementation="pallas_triton")
        )(1.0)


def test_an_unknown_capability(hopper, monkeypatch):
    monkeypatch.setattr(api, "_capability", lambda: (8, 6))
    message = explain()
    assert "compute capability 8.0" in message
    assert "got 8.6" in message


def test_a_gpu_gets_the_kernels(hopper):
    rule = jax.jit(momentum_delta_rule, static_argnames="implementation")
    chosen = rule(**INPUTS)
    named = rule(**INPUTS, implementation="pallas_triton")
    jax.tree.map(np.testing.assert_array_equal, chosen, named)
    scan = momentum_delta_rule(**INPUTS, implementation="scan")
    assert max(relative_errors(chosen, scan).values()) <= 2e-5
    assert "mdn_state_fwd" in str(jax.make_jaxpr(lambda x: momentum_delta_rule(**x))(INPUTS))
    # 16-bit gates and no state
    half = INPUTS | {"beta": INPUTS["beta"].astype(jnp.bfloat16), "initial_state": None}
    expected = momentum_delta_rule(**half, implementation="scan")
    assert max(relative_errors(rule(**half), expected).values()) <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "capability"), [("bfloat16", (9, 0)), ("bfloat16", (8, 0)), ("float16", (9, 0))]
)
def test_16_bits_in_full_precision(dtype, capability, hopper, monkeypatch):
    """In three chunks, with gradients: what 16 bits lose between the kernels is more than 1e-4."""
    monkeypatch.setattr(api, "_capability", lambda: capability)
    # the helper's jitted function does not know the capability: another shape traces it again
    length = {"bfloat16": 130, "float16": 140}[dtype] + capability[0]
    inputs = random_inputs(seed=1, batch=1, length=length, heads=1, dtype=dtype)
    cotangent = random_cotangents(inputs)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, cotangent))
    _, expected = outputs_and_gradients(*wide, implementation="scan")

    def errors():
        (o, _), gradients = outputs_and_gradients(inputs, cotangent, implementation="pallas_triton")
        assert o.dtype == gradients["v"].dtype == dtype
        # of 16-bit results the last rounding is most of the error
        gates = ("log_alpha", "log_mu", "beta", "eta")
        return [relative_error(gradients[name], expected[name]) for name in gates]

    assert min(errors()) > 1e-4
    with jax.default_matmul_precision("highest"):
        assert max(errors()) <= 2e-5


def test_what_the_kernels_get_in_full_precision(hopper, monkeypatch):
    half, single = jnp.dtype("bfloat16"), jnp.dtype("float32")
    assert api._numerics(half).dtype == half
    assert not api._numerics(half).precise
    with jax.default_matmul_precision("high"):
        assert not api._numerics(half).precise
    with jax.default_matmul_precision("float32"):  # another name of the highest
        assert api._numerics(half).precise
        assert api._numerics(jnp.dtype("float16")).dtype == single
    with jax.default_matmul_precision("highest"):
        assert api._numerics(half).precise
        assert not api._numerics(single).precise
        assert api._numerics(half).dtype == half
        assert api._numerics(jnp.dtype("float16")).dtype == single
        monkeypatch.setattr(api, "_capability", lambda: (8, 0))
        assert not api._numerics(half).precise
        assert api._numerics(half).dtype == single
        # float32 keys of 256 and an erase key are too much for its shared memory
        inputs = random_inputs(seed=2, length=2, key_dim=256, explicit_p=True, dtype=half)
        assert "K at most 128" in explain(**inputs, segment_ids=None)
        momentum_delta_rule(**inputs)
