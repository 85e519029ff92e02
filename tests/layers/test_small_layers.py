"""Norm, MLP, convolution and rotary embedding against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import test_util
from jax.ad_checkpoint import print_saved_residuals

from mdn_jax.layers.mlp import SwiGLU
from mdn_jax.layers.norm import RMSNorm
from mdn_jax.layers.rotary import rotate
from mdn_jax.layers.short_conv import ShortConv
from tests.layers.helpers import assert_close, normal


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


@pytest.mark.parametrize("gated", [False, True])
def test_rms_norm(gated):
    norm = RMSNorm(6, eps=0.1, rngs=nnx.Rngs(0))
    norm.scale[...] = normal(0, 6)
    x, gate = normal(1, 2, 3, 6), normal(2, 2, 3, 6) if gated else None
    expected = x / np.sqrt((x * x).mean(-1, keepdims=True) + 0.1) * norm.scale[...]
    if gated:
        expected = expected * sigmoid(gate)
    assert_close(norm(x, gate), jnp.asarray(expected), 1e-6)


def test_rms_norm_is_float32_inside():
    x = normal(0, 4, 64).astype(jnp.bfloat16)
    y = RMSNorm(64, eps=1e-6, rngs=nnx.Rngs(0))(x)
    exact = np.asarray(x, np.float64)
    exact /= np.sqrt((exact * exact).mean(-1, keepdims=True) + 1e-6)
    assert_close(y, jnp.asarray(exact, jnp.float32), 1e-6)
    low = RMSNorm(64, eps=1e-6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x)
    np.testing.assert_array_equal(low, y.astype(jnp.bfloat16))


def test_swiglu():
    mlp = SwiGLU(4, 6, rngs=nnx.Rngs(0))
    x = normal(0, 2, 3, 4)
    gate, up = (np.asarray(x @ p.kernel[...], np.float64) for p in (mlp.gate_proj, mlp.up_proj))
    expected = (gate * sigmoid(gate) * up) @ np.asarray(mlp.down_proj.kernel[...])
    assert_close(mlp(x), jnp.asarray(expected, jnp.float32), 1e-6)


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_short_conv(size, length):
    conv = ShortConv(5, size, use_bias=True, initializer_range=1.0, rngs=nnx.Rngs(0))
    conv.bias[...] = normal(0, 5)
    x, before = normal(1, 2, length, 5), normal(2, 2, size, 5)
    ids = np.array([[5] * length, [5, 5, 0, 5, 5, 5, 0][:length]], np.int32)  # ids that come back
    y, tail = conv(x, before, segment_ids=jnp.asarray(ids))

    inputs = np.concatenate([before, x], axis=1)
    numbers = np.array([[0] * length, [0, 0, 1, 2, 2, 2, 3][:length]])
    padded = np.concatenate([np.zeros((2, size), int), numbers], axis=1)
    for row in range(2):
        seen = np.where((padded[row] == padded[row, -1])[:, None], inputs[row], 0)
        np.testing.assert_array_equal(tail[row], seen[-size:])
        for t in range(length):
            total = np.asarray(conv.bias[...], np.float64)
            for lag in range(size):
                step = size + t - lag
                if padded[row, step] == padded[row, size + t]:
                    total = total + inputs[row, step] * np.asarray(conv.kernel[size - 1 - lag])
            np.testing.assert_allclose(y[row, t], total * sigmoid(total), rtol=1e-5, atol=1e-6)
    if length <= 2:
        return
    assert_close(conv(x[:1], before[:1]), (y[:1], tail[:1]), 0)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("length", "bias", "packed"), [(1, True, False), (2, False, True), (6, True, True)]
)
def test_short_conv_gradients(x64, size, length, bias, packed):
    layer = ShortConv(
        3,
        size,
        use_bias=bias,
        initializer_range=1.0,
        dtype=jnp.float64,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    graph, params = nnx.split(layer)
    ids = jnp.asarray([[3] * length, [3, 1, 3, 3, 1, 3][:length]])
    segment_ids = ids if packed else None

    def run(params, x, before):
        return nnx.merge(graph, params)(x, before, segment_ids=segment_ids)

    inputs = normal(1, 2, length, 3), normal(2, 2, size, 3)
    inputs = tuple(x.astype(jnp.float64) for x in inputs)
    # finite differences; twice
    test_util.check_grads(run, (params, *inputs), order=2, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_short_conv_sums_in_float32():
    conv = ShortConv(1, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    conv.kernel[...] = jnp.asarray([[256.0], [1.0], [-256.0]])
    y, _ = conv(jnp.ones((1, 1, 1)), jnp.ones((1, 3, 1)))
    np.testing.assert_allclose(float(y[0, 0, 0]), sigmoid(1.0), rtol=1e-2)


LOW = {"dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
X = jnp.zeros((2, 7, 8), jnp.bfloat16)
KEEPING = {
    "norm": (RMSNorm(8, eps=1e-6, **LOW), lambda layer, x: layer(x), 1),
    "gated norm": (RMSNorm(8, eps=1e-6, **LOW), lambda layer, x: layer(x, x + 1), 2),
    "mlp": (SwiGLU(8, 16, **LOW), lambda layer, x: layer(x), 4),  # the inputs of its products
    "conv": (ShortConv(8, 4, **LOW), lambda layer, x: layer(x, x[:, :4])[0], 2),  # and its sum
}


@pytest.mark.parametrize("name", KEEPING)
def test_the_backward_pass_keeps_low_precision_inputs_only(name, capsys):
    layer, apply, count = KEEPING[name]
    graph, state = nnx.split(layer)
    print_saved_residuals(lambda state, x: apply(nnx.merge(graph, state), x), state, X)
    kept = capsys.readouterr().out
    assert kept.count("bf16[2,7,") == count, kept
    assert kept.count("f32[2,7,") == 0, kept


def test_compiled_convolutions_keep_nothing_wide():
    """XLA would keep what both passes widen, were it free to see that it is the same."""

    def memory(layers):
        conv = ShortConv(64, 4, **LOW)

        def loss(x):
            for _ in range(layers):
                x = jnp.sin(conv(x, x[:, :4])[0])  # keeps its input, too
            return x.astype(jnp.float32).sum()

        x = jax.ShapeDtypeStruct((2, 512, 64), jnp.bfloat16)
        compiled = jax.jit(jax.grad(loss)).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (x.size * x.dtype.itemsize)

    assert memory(6) - memory(2) <= 4 * 2.5  # the input and the sum, from which the output follows


def test_rotary_turns_pairs_by_the_distance():
    x = normal(0, 1, 4, 2, 6)
    positions = jnp.asarray([[0, 1, 5, 100]], jnp.int32)
    y = np.asarray(rotate(x, positions, theta=100.0), np.float64)
    pairs = np.asarray(x[..., :3]) + 1j * np.asarray(x[..., 3:])
    angles = np.asarray(positions)[..., None] * 100.0 ** (-np.arange(3) / 3)
    turned = pairs * np.exp(1j * angles)[:, :, None]
    np.testing.assert_allclose(y[..., :3] + 1j * y[..., 3:], turned, atol=2e-5)
    assert rotate(x.astype(jnp.bfloat16), positions, theta=100.0).dtype == jnp.bfloat16


def test_rotary_scores_depend_on_the_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(i, j):
        a, b = (rotate(x, jnp.full((1, 1), t), theta=1e4) for x, t in ((q, i), (k, j)))
        return float((a * b).sum())

    np.testing.assert_allclose(score(3, 1), score(53, 51), rtol=1e-3)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3
