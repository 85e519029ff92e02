"""Softmax attention: against numpy, caches, packed documents, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mdn_jax.layers import SoftmaxAttention
from mdn_jax.layers import attend as attend_module
from mdn_jax.layers.attend import Tokens, attend, fused_implementation
from tests.layers.helpers import assert_close, call, normal

HIDDEN, HEADS, T = 32, 4, 9
X = normal(1, 2, T, HIDDEN)


def make(**options):
    options = {"num_kv_heads": 2, "initializer_range": 0.3, "rngs": nnx.Rngs(0)} | options
    return SoftmaxAttention(HIDDEN, HEADS, **options)


WINDOWED = make(window_size=4)
FULL = make()


def naive(layer, x, ids):
    """Definition with loops, float64: one query, one head at a time."""
    x, width = np.asarray(x, np.float64), HIDDEN // HEADS

    def project(linear):
        y = x @ np.asarray(linear.kernel[...], np.float64)
        if linear.bias is not None:
            y = y + np.asarray(linear.bias[...], np.float64)
        return y.reshape(*x.shape[:2], -1, width)

    def turn(vector, position):
        if layer.rope_theta is None:
            return vector
        half = width // 2
        angle = position * layer.rope_theta ** (-np.arange(half) / half)
        turned = (vector[:half] + 1j * vector[half:]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag])

    q, k, v = (project(p) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    o = np.zeros_like(q)
    for row, t, head in np.ndindex(*q.shape[:3]):
        shared = head // (HEADS // layer.num_kv_heads)
        window = layer.window_size or T
        seen = [s for s in range(max(0, t - window + 1), t + 1) if ids[row][s] == ids[row][t]]
        start = min(s for s in range(T) if ids[row][s] == ids[row][t])
        query = turn(q[row, t, head], t - start)
        scores = [query @ turn(k[row, s, shared], s - start) / np.sqrt(width) for s in seen]
        weights = np.exp(scores) / np.exp(scores).sum()
        o[row, t, head] = sum(w * v[row, s, shared] for w, s in zip(weights, seen, strict=True))
    return o.reshape(*x.shape) @ np.asarray(layer.o_proj.kernel[...], np.float64)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, None])
@pytest.mark.parametrize("window", [1, 3, None])
def test_against_the_definition(kv_heads, window):
    layer = make(num_kv_heads=kv_heads, window_size=window, qkv_bias=kv_heads == 2, rope_theta=50.0)
    if kv_heads == 2:
        for i, projection in enumerate((layer.q_proj, layer.k_proj, layer.v_proj)):
            projection.bias[...] = normal(i, *projection.bias.shape)
    ids = jnp.asarray([[0] * T, [3, 3, 3, 4, 6, 6, 6, 6, 6]], jnp.int32)
    y, _ = call(layer, X, ids)
    assert_close(y, jnp.asarray(naive(layer, X, ids), jnp.float32), 2e-6)
    without, _ = call(layer, X[:1])
    assert_close(without, y[:1], 1e-6)


def test_without_positions():
    layer = make(rope_theta=None)
    y, _ = call(layer, X)
    assert_close(y, jnp.asarray(naive(layer, X, [[0] * T] * 2), jnp.float32), 2e-6)
    swapped, _ = call(layer, X.at[:, jnp.asarray([0, 1])].set(X[:, jnp.asarray([1, 0])]))
    assert_close(swapped[:, 2:], y[:, 2:], 2e-6)  # the order of what came before does not count


def check_split(layer, split, max_length):
    y, cache = call(layer, X, None, layer.init_cache(2, max_length))
    first, middle = call(layer, X[:, :split], None, layer.init_cache(2, max_length))
    second, last = call(layer, X[:, split:], None, middle)
    assert_close((jnp.concatenate([first, second], axis=1), last), (y, cache))
    assert_close(call(layer, X)[0], y)


@pytest.mark.parametrize("layer", [WINDOWED, FULL], ids=["windowed", "full"])
@pytest.mark.parametrize("max_length", [None, T, T + 3])
def test_splitting_is_one_call(layer, max_length):
    check_split(layer, 6, max_length)


@pytest.mark.slow
@settings(max_examples=T - 1)
@given(st.integers(1, T - 1))
def test_splitting_anywhere_is_one_call(split):
    check_split(WINDOWED, split, None)
    check_split(FULL, split, T)


def test_a_window_bounds_the_cache():
    assert FULL.init_cache(2).k.shape == (2, 0, 2, 8)
    assert WINDOWED.init_cache(2, 100).k.shape == (2, 3, 2, 8)
    assert make(window_size=1).init_cache(2, 100).k.shape == (2, 0, 2, 8)
    for layer, entries in ((FULL, T), (WINDOWED, 3), (make(window_size=1), 0)):
        _, cache = call(layer, X)
        assert cache.k.shape == cache.v.shape == (2, entries, 2, 8)
        np.testing.assert_array_equal(cache.positions, np.arange(T - entries, T)[None].repeat(2, 0))
        np.testing.assert_array_equal(cache.next_position, T)


def test_a_full_cache_forgets_the_oldest():
    _, cache = call(FULL, X, None, FULL.init_cache(2, 4))
    y, after = call(FULL, X[:, :1], None, cache)
    np.testing.assert_array_equal(after.positions, np.tile(np.arange(6, 10), (2, 1)))
    five, _ = call(make(window_size=5), jnp.concatenate([X, X[:, :1]], axis=1))
    assert_close(y[:, 0], five[:, -1])


@pytest.mark.parametrize("max_length", [None, 6])
def test_the_cache_goes_to_the_first_document_and_comes_from_the_last(max_length):
    ids = jnp.asarray([[2] * 5 + [3] * 4] * 2, jnp.int32)
    _, before = call(FULL, normal(2, 2, 6, HIDDEN), None, FULL.init_cache(2, max_length))
    y, after = call(FULL, X, ids, before)
    first, _ = call(FULL, X[:, :5], None, before)
    second, last = call(FULL, X[:, 5:])
    assert_close(y, jnp.concatenate([first, second], axis=1))
    np.testing.assert_array_equal(after.positions[:, :-4], -1)
    np.testing.assert_array_equal(after.k[:, :-4], 0)
    np.testing.assert_array_equal(after.v[:, :-4], 0)
    assert_close((after.k[:, -4:], after.positions[:, -4:]), (last.k, last.positions))
    np.testing.assert_array_equal(after.next_position, 4)
    # and nothing of the first document is seen afterwards
    assert_close(call(FULL, X[:, :2], None, after)[0], call(FULL, X[:, :2], None, last)[0])


@given(st.lists(st.integers(1, T - 1), max_size=3))
def test_no_gradient_crosses_a_boundary(cuts):
    ids = jnp.asarray([[sum(t >= c for c in cuts) for t in range(T)]] * 2, jnp.int32)
    _, cache = call(FULL, normal(2, 2, 6, HIDDEN), None, FULL.init_cache(2, 6))
    cache = dataclasses.replace(cache, next_position=jnp.asarray([6, 6], jnp.int32))
    for document in range(int(ids[0, -1]) + 1):
        inside = np.flatnonzero(ids[0] == document)
        if inside.size == 0:
            continue
        cotangent = jnp.zeros_like(X).at[:, inside].set(1.0)
        _, g_x = vjp_of_x(FULL, X, cotangent, ids, cache)
        outside = np.setdiff1d(np.arange(T), inside)
        np.testing.assert_array_equal(g_x[0][:, outside], 0)
        assert jnp.abs(g_x[0][:, inside]).max(axis=(0, 2)).min() > 0
        for leaf in g_x[1]:
            assert bool(jnp.any(leaf != 0)) == (inside[0] == 0)


@nnx.jit
def vjp_of_x(layer, x, cotangent, ids, cache):
    def loss(x, kv):
        y, _ = layer(x, ids, dataclasses.replace(cache, k=kv[0], v=kv[1]))
        return (y * cotangent).sum()

    return None, jax.grad(loss, argnums=(0, 1))(x, (cache.k, cache.v))


def test_packed_documents_are_each_alone():
    ids = jnp.asarray([[0] * 5 + [1] * 4] * 2, jnp.int32)
    cotangent = normal(3, *X.shape)
    packed, g_x, _ = vjp_all(WINDOWED, X, cotangent, ids)
    first, g_first, _ = vjp_all(WINDOWED, X[:, :5], cotangent[:, :5])
    second, g_second, _ = vjp_all(WINDOWED, X[:, 5:], cotangent[:, 5:])
    assert_close(g_x, jnp.concatenate([g_first, g_second], axis=1))
    assert_close(packed, jax.tree.map(jnp.add, first, second))


@nnx.jit
def vjp_all(layer, x, cotangent, ids=None):
    def loss(layer, x):
        return (layer(x, ids)[0] * cotangent).sum()

    return (*nnx.grad(loss, argnums=(0, 1))(layer, x), None)


@pytest.mark.parametrize("window", [None, 1, 3, 7])
@pytest.mark.parametrize("before", [0, 5])
def test_blocks_of_queries_change_nothing(window, before):
    q, (k, v) = normal(0, 2, T, 4, 8), normal(1, 2, 2, T + before, 2, 8)
    positions = jnp.tile(jnp.arange(T + before, dtype=jnp.int32), (2, 1))
    documents = jnp.asarray([[0] * (T + before), [0] * (before + 4) + [1] * 5], jnp.int32)
    keys = Tokens(positions, documents)
    queries = Tokens(positions[:, before:], documents[:, before:])

    def run(block):
        def attended(*x):
            return attend(*x, queries, keys, window, packed=True, block=block)

        @jax.jit
        def outputs_and_gradients(*x):
            y, pull = jax.vjp(attended, *x)
            return y, pull(jnp.ones_like(y))

        return outputs_and_gradients(q, k, v)

    assert_close(run(2), run(T), 2e-6)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_the_fused_call_is_the_same(window, packed, monkeypatch):
    """As cuDNN is called on a GPU, by the implementation that runs everywhere."""
    q, (k, v) = normal(0, 2, T, 4, 8), normal(1, 2, 2, T, 2, 8)
    positions = jnp.tile(jnp.arange(T, dtype=jnp.int32), (2, 1))
    documents = jnp.asarray([[0] * T, [0] * 4 + [1] * 5], jnp.int32) * packed
    tokens = Tokens(positions, documents)

    def run():
        @jax.jit
        def outputs_and_gradients(*x):
            y, pull = jax.vjp(lambda *x: attend(*x, tokens, tokens, window, packed=packed), *x)
            return y, pull(jnp.cos(y))

        return outputs_and_gradients(q, k, v)

    expected = run()
    monkeypatch.setattr(attend_module, "fused_implementation", lambda *_, **__: "xla")
    assert_close(run(), expected, 2e-6)


def test_which_calls_are_fused(monkeypatch):
    q = jnp.zeros((1, 128, 4, 64), jnp.bfloat16)
    assert fused_implementation(q, q, packed=True) is None  # on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    device = type("Device", (), {"compute_capability": "9.0"})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert fused_implementation(q, q, packed=True) == "cudnn"
    assert fused_implementation(q[:, :127], q[:, :127], packed=False) == "cudnn"
    for other in (
        (q[:, :127], q[:, :127]),  # an odd number of packed tokens
        (q[:, :32], q[:, :32]),
        (q[:, 1:], q),  # tokens before, from a cache
        (q.astype(jnp.float32), q.astype(jnp.float32)),
        (q[..., :63], q[..., :63]),
    ):
        assert fused_implementation(*other, packed=True) is None
    device.compute_capability = "7.5"
    assert fused_implementation(q, q, packed=False) is None


def test_bfloat16():
    low = make(dtype=jnp.bfloat16)
    y, cache = call(low, X)
    assert y.dtype == cache.k.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), call(FULL, X)[0], 3e-2)


CACHE = FULL.init_cache(2, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((X[:, :, :31],), ValueError, ["x", "hidden_size = 32", "[2, 9, 31]"]),
        ((X, jnp.zeros((2, 8), int)), ValueError, ["segment_ids", "[2, 9]", "[2, 8]"]),
        ((X, None, (X, X)), TypeError, ["cache", "AttentionCache", "tuple"]),
        (
            (X, None, FULL.init_cache(3, 5)),
            ValueError,
            ["cache.k", "[2, any, 2, 8]", "[3, 5, 2, 8]"],
        ),
        (
            (X, None, dataclasses.replace(CACHE, next_position=jnp.zeros((3,), int))),
            ValueError,
            ["cache.next_position", "[2]", "[3]"],
        ),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error) as raised:
        FULL(*arguments)
    for word in words:
        assert word in str(raised.value), str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_kv_heads": 3}, ["num_kv_heads", "divisor of num_heads = 4", "3"]),
        ({"num_kv_heads": 0}, ["num_kv_heads", "0"]),
    ],
)
def test_bad_sizes(options, words):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        make(**options)
    for word in words:
        assert word in str(raised.value)


def test_odd_head_width():
    with pytest.raises(ValueError, match="num_heads: expected heads of an even width"):
        SoftmaxAttention(12, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="max_length: expected an int >= 1 or None, got 0"):
        FULL.init_cache(1, 0)
