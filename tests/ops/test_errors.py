"""Bad input gets an error that names the argument, what was expected and what came."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.testing import random_inputs

BASE = random_inputs(seed=0, length=6, heads=2, value_heads=4, key_dim=4, value_dim=3)


def gate(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": jnp.zeros((2, 6, 4))}, ValueError, ["q", "rank 4", "[2, 6, 4]"]),
        ({"q": [[1.0]]}, TypeError, ["q", "array", "list"]),
        ({"k": jnp.zeros((2, 6, 2, 5))}, ValueError, ["k", "[2, 6, 2, 4]", "[2, 6, 2, 5]"]),
        ({"v": jnp.zeros((2, 5, 4, 3))}, ValueError, ["v", "2, 6", "[2, 5, 4, 3]"]),
        ({"v": jnp.zeros((2, 6, 3, 3))}, ValueError, ["v", "multiple of H = 2", "HV = 3"]),
        ({"v": jnp.zeros((2, 6, 4, 0))}, ValueError, ["v", ">= 1", "[2, 6, 4, 0]"]),
        ({"v": BASE["v"].astype(jnp.bfloat16)}, TypeError, ["v", "float32", "bfloat16"]),
        ({"q": jnp.zeros((2, 6, 2, 4), jnp.int32)}, TypeError, ["q", "float32", "int32"]),
        ({"log_alpha": gate(2, 6, 2)}, ValueError, ["log_alpha", "[2, 6, 4]", "[2, 6, 2]"]),
        ({"log_mu": gate(2, 6, 4, dtype=jnp.bfloat16)}, TypeError, ["log_mu", "bfloat16"]),
        ({"beta": gate(2, 6, 4, dtype=jnp.int32)}, TypeError, ["beta", "int32"]),
        ({"eta": 1.0}, TypeError, ["eta", "[B, T, HV]", "float"]),
        ({"p": jnp.zeros((2, 6, 3, 4))}, ValueError, ["p", "H or HV", "[2, 6, 3, 4]"]),
        ({"p": jnp.zeros((2, 6, 4, 4), jnp.float16)}, TypeError, ["p", "float32", "float16"]),
        ({"initial_state": jnp.zeros((2, 4, 4, 3))}, TypeError, ["initial_state", "MDNState"]),
        (
            {"initial_state": MDNState(jnp.zeros((2, 4, 4, 3)), jnp.zeros((2, 2, 4, 3)))},
            ValueError,
            ["initial_state.m", "[2, 4, 4, 3]", "[2, 2, 4, 3]"],
        ),
        ({"segment_ids": jnp.zeros((2, 6))}, TypeError, ["segment_ids", "integer", "float32"]),
        ({"segment_ids": jnp.zeros((2, 5), int)}, ValueError, ["segment_ids", "[2, 6]", "[2, 5]"]),
        ({"segment_ids": jnp.zeros((2, 6), bool)}, TypeError, ["segment_ids", "integer", "bool"]),
        ({"implementation": "cuda"}, ValueError, ["implementation", "scan", "xla", "'cuda'"]),
        ({"chunk_size": 0}, ValueError, ["chunk_size", ">= 1", "0"]),
        ({"chunk_size": 2.0}, ValueError, ["chunk_size", "int", "2.0"]),
        ({"scale": float("nan")}, ValueError, ["scale", "finite", "nan"]),
        ({"scale": np.float32("nan")}, ValueError, ["scale", "finite", "nan"]),
        ({"scale": np.float64("-inf")}, ValueError, ["scale", "finite", "-inf"]),
        ({"scale": np.asarray(np.inf)}, ValueError, ["scale", "finite", "inf"]),
        ({"scale": jnp.asarray(jnp.nan, jnp.bfloat16)}, ValueError, ["scale", "finite", "nan"]),
        ({"scale": 10**400}, ValueError, ["scale", "finite"]),
        ({"scale": np.ones(2)}, TypeError, ["scale", "finite number", "float64[2]"]),
        ({"scale": True}, TypeError, ["scale", "finite number", "bool True"]),
        ({"scale": "1"}, TypeError, ["scale", "finite number", "str '1'"]),
        ({"scale": 1j}, TypeError, ["scale", "finite number", "complex"]),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error) as raised:
        momentum_delta_rule(**(BASE | change))
    message = str(raised.value)
    for word in words:
        assert word in message, message


def test_errors_survive_jit():
    bad = BASE | {"v": jnp.zeros((2, 6, 3, 3))}
    with pytest.raises(ValueError, match="multiple of H"):
        jax.jit(momentum_delta_rule)(**bad)


def test_numpy_arrays_are_welcome():
    as_numpy = jax.tree.map(np.asarray, BASE)
    o, _ = momentum_delta_rule(**as_numpy)
    np.testing.assert_array_equal(o, momentum_delta_rule(**BASE)[0])


def test_a_scale_of_any_type_of_number():
    expected, _ = momentum_delta_rule(**BASE, scale=-0.5)
    traced = jax.jit(lambda scale: momentum_delta_rule(**BASE, scale=scale)[0])
    for scale in (np.float32(-0.5), np.asarray(-0.5), jnp.asarray(-0.5)):
        for o in (momentum_delta_rule(**BASE, scale=scale)[0], traced(scale)):
            np.testing.assert_allclose(o, expected, rtol=1e-4, atol=1e-6)
