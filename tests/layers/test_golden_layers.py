"""Golden vectors of the layers, made with the published implementation in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax.interop import layer_from_official
from mdn_jax.interop.official import load_official
from mdn_jax.layers import SoftmaxAttention
from mdn_jax.testing import relative_error
from tests.layers.helpers import GOLDEN, INDEX, call, check_errors, golden, gradient_errors

pytestmark = pytest.mark.slow
DTYPES = ("float64", "float32")
# the definition for what is exact; what people run, which tests/ops/test_golden.py has in both
IMPLEMENTATIONS = {"float64": "scan", "float32": None}
CASES = sorted(path.stem for path in GOLDEN.glob("layer_*.npz"))


def test_all_cases_are_here():
    assert {case.removeprefix("layer_") for case in CASES} == set(INDEX["layer"])


def output_and_gradient_errors(layer, data, dtype, inside=lambda layer, x: None):
    """Errors, the cache and `inside(layer, x)`, from one compiled program."""
    x, cotangent = (jnp.asarray(data[name], dtype) for name in ("x", "ct_y"))

    @nnx.jit
    def everything(layer, x):
        def loss(layer, x):
            y, cache = layer(x)
            return (y * cotangent).sum(), (y, cache)

        gradients, outputs = nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
        return gradients, outputs, inside(layer, x)

    (gradients, g_x), (y, cache), middle = everything(layer, x)
    assert y.dtype == dtype
    errors = {"y": relative_error(y, data["y"]), "g_x": relative_error(g_x, data["g_x"])}
    return errors | gradient_errors(layer, gradients, data), cache, middle


def convolved_and_gates(layer, x):
    return layer.qkv(x, None, layer.init_cache(x.shape[0]))[:3], layer.gates(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_momentum_deltanet(case, dtype, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    about = INDEX["layer"][case.removeprefix("layer_")]
    data, tensors = golden(case)
    layer = layer_from_official(
        about["config"],
        tensors,
        implementation=IMPLEMENTATIONS[dtype],
        dtype=dtype,
        param_dtype=dtype,
    )
    errors, cache, (qkv, gates) = output_and_gradient_errors(
        layer, data, dtype, convolved_and_gates
    )

    x = jnp.asarray(data["x"], dtype)
    _, prefill = call(layer, x[:, : about["prefill"]])
    for prefix, ours in (("cache", cache), ("cache_prefill", prefill)):
        expected = data[f"{prefix}/recurrent_state"]
        errors[f"{prefix}/s"] = relative_error(ours.state.s, expected[0])
        errors[f"{prefix}/m"] = relative_error(ours.state.m, expected[1])
        for name in "qkv":
            tail = np.swapaxes(getattr(ours, f"{name}_tail"), 1, 2)
            errors[f"{prefix}/{name}"] = relative_error(tail, data[f"{prefix}/conv_state_{name}"])

    for name, ours in zip("qkv", qkv, strict=True):
        expected = data[f"mid/{name}"]
        ours = np.repeat(ours, expected.shape[2] // ours.shape[2], axis=2)
        errors[f"mid/{name}"] = relative_error(ours, expected)
    for name, ours in gates._asdict().items():
        assert ours.dtype == dtype
        errors[f"mid/{name}"] = relative_error(ours, data[f"mid/{name}"])
    check_errors(errors, dtype, about["fp32_rel_err"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_attention(dtype, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    about = INDEX["attn"]["attn_window_T37"]
    data, tensors = golden("attn_window_T37")
    names = ("num_kv_heads", "qkv_bias", "window_size", "rope_theta")
    layer = load_official(
        lambda: SoftmaxAttention(
            about["config"]["hidden_size"],
            about["config"]["num_heads"],
            **{name: about["config"][name] for name in names},
            dtype=dtype,
            param_dtype=dtype,
            rngs=nnx.Rngs(0),
        ),
        tensors,
    )
    errors, *_ = output_and_gradient_errors(layer, data, dtype)
    check_errors(errors, dtype, about["fp32_rel_err"])
