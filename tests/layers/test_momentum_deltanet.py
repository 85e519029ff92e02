"""The Momentum DeltaNet layer: caches, packed documents, grouped heads, options, errors."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mdn_jax import MomentumDeltaNet
from mdn_jax.layers import MDNCache
from mdn_jax.ops import MDNState
from mdn_jax.testing import relative_error
from tests.layers.helpers import TINY, assert_close, call, normal, vjp

T = 9
GROUPED = dataclasses.replace(TINY, num_v_heads=4, conv_bias=True)
# "scan" compiles faster; `test_implementations_agree` holds the default to it
make = partial(MomentumDeltaNet, implementation="scan")
LAYER = make(GROUPED, rngs=nnx.Rngs(0))
X = normal(1, 2, T, TINY.hidden_size)


def segments(cuts):
    """[2, T] segment ids with a new document at every cut of a row."""
    return jnp.asarray([[sum(t >= c for c in row) for t in range(T)] for row in cuts], jnp.int32)


def alone(x, start, stop):
    """`x[start:stop]` at the start of rows of the same length, then something else."""
    return jnp.roll(x, -start, axis=1).at[:, stop - start :].set(7.0)


def documents(row):
    """Ranges of steps with equal ids."""
    edges = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]
    return list(itertools.pairwise(edges))


def test_output_and_cache_shapes_and_dtypes():
    y, cache = call(LAYER, X)
    assert y.shape == X.shape
    assert y.dtype == jnp.float32
    assert cache.state.s.shape == cache.state.m.shape == (2, 4, 8, 16)
    assert cache.q_tail.shape == cache.k_tail.shape == (2, 4, 16)
    assert cache.v_tail.shape == (2, 4, 64)
    assert jax.tree.map(jnp.shape, LAYER.init_cache(2)) == jax.tree.map(jnp.shape, cache)
    assert_close(call(LAYER, X, None, LAYER.init_cache(2)), (y, cache), 0)


def test_tails_hold_the_last_projections():
    _, cache = call(LAYER, X[:, :3])
    projected = LAYER.k_proj(X[:, :3])
    np.testing.assert_array_equal(cache.k_tail[:, 0], 0)
    assert_close(cache.k_tail[:, 1:], projected)


def check_split(split):
    y, cache = call(LAYER, X)
    first, middle = call(LAYER, X[:, :split], None, LAYER.init_cache(2))  # compiled once a length
    second, last = call(LAYER, X[:, split:], None, middle)
    assert_close((jnp.concatenate([first, second], axis=1), last), (y, cache))


def test_splitting_is_one_call():
    check_split(4)


@pytest.mark.slow
@settings(max_examples=T - 1)
@given(st.integers(1, T - 1))
def test_splitting_anywhere_is_one_call(split):
    check_split(split)


def test_the_cache_goes_to_the_first_document_and_comes_from_the_last():
    ids = segments([[4], [4]])
    _, before = call(LAYER, normal(2, *X.shape))
    y, after = call(LAYER, X, ids, before)
    first, _ = call(LAYER, X[:, :4], None, before)
    second, last = call(LAYER, X[:, 4:])
    assert_close((y, after), (jnp.concatenate([first, second], axis=1), last))


def test_a_short_last_document_leaves_no_other_tokens_in_the_tails():
    _, cache = call(LAYER, X, segments([[T - 2], [T - 1]]))
    np.testing.assert_array_equal(cache.v_tail[0, :2], 0)
    np.testing.assert_array_equal(cache.v_tail[1, :3], 0)
    assert_close(cache.v_tail[1, 3], LAYER.v_proj(X[1, T - 1]))


CUTS = st.lists(st.integers(1, T - 1), max_size=3)


@pytest.mark.slow
@given(CUTS, CUTS)
def test_packed_documents_are_each_alone(first, second):
    ids = segments([first, second])
    cotangent = normal(3, *X.shape)
    y, _ = call(LAYER, X, ids)
    gradients, g_x, _ = vjp(LAYER, X, cotangent, ids)
    total = jax.tree.map(jnp.zeros_like, gradients)
    for row in range(2):
        for start, stop in documents(ids[row]):
            inside = (
                jnp.zeros_like(cotangent).at[row, : stop - start].set(cotangent[row, start:stop])
            )
            x = alone(X, start, stop)
            expected, _ = call(LAYER, x)
            assert_close(y[row, start:stop], expected[row, : stop - start])
            by_parameter, by_x, _ = vjp(LAYER, x, inside)
            assert_close(g_x[row, start:stop], by_x[row, : stop - start])
            total = jax.tree.map(jnp.add, total, by_parameter)
    assert_close(gradients, total)


@given(CUTS)
def test_no_gradient_crosses_a_boundary(cuts):
    ids = segments([cuts, cuts])
    state = MDNState(normal(4, 2, 4, 8, 16), normal(5, 2, 4, 8, 16))
    cache = MDNCache(state, normal(6, 2, 4, 16), normal(7, 2, 4, 16), normal(8, 2, 4, 64))
    for start, stop in documents(ids[0]):
        cotangent = jnp.zeros_like(X).at[:, start:stop].set(1.0)
        _, g_x, g_cache = vjp(LAYER, X, cotangent, ids, cache)
        assert jnp.abs(g_x[:, start:stop]).min(axis=(0, 2)).min() > 0
        np.testing.assert_array_equal(g_x[:, :start], 0)
        np.testing.assert_array_equal(g_x[:, stop:], 0)
        for leaf in jax.tree.leaves(g_cache):
            assert bool(jnp.any(leaf != 0)) == (start == 0)


@given(st.integers(0, T - 1))
def test_causality(step):
    later = X.at[:, step + 1 :].add(1.0)
    np.testing.assert_array_equal(
        call(LAYER, later)[0][:, : step + 1], call(LAYER, X)[0][:, : step + 1]
    )


def test_rows_are_independent():
    ids = segments([[3, 5], [7]])
    y, cache = call(LAYER, X, ids)
    flipped = call(LAYER, X[::-1], ids[::-1])
    assert_close(jax.tree.map(lambda x: x[::-1], flipped), (y, cache), 1e-6)


@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.parametrize("p_times_alpha", [True, False])
def test_grouped_heads_are_repeated_heads(correction, p_times_alpha):
    config = dataclasses.replace(
        GROUPED, use_output_correction=correction, use_p_times_alpha=p_times_alpha
    )
    grouped = make(config, rngs=nnx.Rngs(0))
    full = make(dataclasses.replace(config, num_heads=4), rngs=nnx.Rngs(1))

    def repeat(path, target, source):
        if path[0].key[0] in "qk" and target.shape != source.shape:
            heads = source.reshape(*source.shape[:-1], 2, 8)
            return jnp.repeat(heads, 2, axis=-2).reshape(target.shape)
        return source

    state = nnx.state(grouped, nnx.Param)
    nnx.update(full, jax.tree.map_with_path(repeat, nnx.state(full, nnx.Param), state))
    y, cache = call(grouped, X)
    expected, expected_cache = call(full, X)
    assert_close((y, cache.state), (expected, expected_cache.state))


OPTIONS = {
    "no convolution": {"use_short_conv": False},
    "long convolution": {"conv_size": 6},
    "one tap": {"conv_size": 1},
    "no gate": {"use_gate": False},
    "lora gate": {"use_lora_gate": True, "lora_gate_rank": 3},
    "plain": {"use_output_correction": False, "min_log_mu": None, "use_p_times_alpha": False},
    "wide input": {"tau_factor": 8, "expand_v": 1.5},
    "stable": {"bound": "stable", "num_v_heads": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_splits_and_packs(option):
    config = dataclasses.replace(TINY, **OPTIONS[option])
    layer = make(config, rngs=nnx.Rngs(0))
    x, empty = normal(1, 2, 10, TINY.hidden_size), layer.init_cache(2)
    y, cache = call(layer, x)
    # halves, so that one program serves all three
    first, middle = call(layer, x[:, :5], None, empty)
    second, last = call(layer, x[:, 5:], None, middle)
    assert_close((jnp.concatenate([first, second], axis=1), last), (y, cache))
    ids = jnp.arange(10)[None].repeat(2, axis=0) // 5
    packed, last = call(layer, x, ids)
    expected = call(layer, x[:, 5:], None, empty)
    assert_close((packed[:, :5], packed[:, 5:], last), (first, *expected))


def test_options_change_the_output():
    outputs = {"default": call(make(TINY, rngs=nnx.Rngs(0)), X)[0]}
    for option in ("no gate", "plain", "stable"):
        config = dataclasses.replace(TINY, **OPTIONS[option])
        outputs[option] = call(make(config, rngs=nnx.Rngs(0)), X)[0]
    names = list(outputs)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert relative_error(outputs[name], outputs[other]) > 1e-2, (name, other)


def test_implementations_agree():
    """Outputs, caches and gradients of packed rows that go on."""
    default = MomentumDeltaNet(GROUPED, rngs=nnx.Rngs(0))
    ids = segments([[3, 5], [7]])
    _, before = call(LAYER, normal(2, *X.shape))

    @nnx.jit
    def everything(layer, x, cache):
        def loss(layer, x, cache):
            y, after = layer(x, ids, cache)
            return (y * jnp.cos(X)).sum() + (after.state.s * after.state.m).sum(), (y, after)

        return nnx.grad(loss, argnums=(0, 1, 2), has_aux=True)(layer, x, cache)

    gradients, outputs = everything(default, X, before)
    assert_close((gradients, outputs), everything(LAYER, X, before))
    with pytest.raises(ValueError, match="implementation"):
        MomentumDeltaNet(GROUPED, rngs=nnx.Rngs(0), implementation="cuda")(X)


def test_bfloat16_computes_in_bfloat16_with_float32_gates_and_states():
    low = MomentumDeltaNet(GROUPED, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    y, cache = call(low, X)
    assert y.dtype == cache.q_tail.dtype == jnp.bfloat16
    assert cache.state.s.dtype == jnp.float32
    assert {gate.dtype for gate in low.gates(X)} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in jax.tree.leaves(nnx.state(low, nnx.Param))} == {jnp.dtype(jnp.float32)}
    assert relative_error(y, call(LAYER, X)[0]) < 3e-2
    gradients, _, _ = vjp(low, X, jnp.ones_like(X))
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}


CACHE = LAYER.init_cache(2)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((X[0],), ValueError, ["x", "[B, T, hidden_size = 32]", "[9, 32]"]),
        ((X[:, :, :31],), ValueError, ["x", "hidden_size = 32", "[2, 9, 31]"]),
        ((X[:, :0],), ValueError, ["x", ">= 1", "[2, 0, 32]"]),
        ((X.astype(int),), TypeError, ["x", "float", "int32"]),
        (([1.0],), TypeError, ["x", "[B, T, hidden_size = 32]", "list"]),
        ((X, jnp.zeros((2, 8), int)), ValueError, ["segment_ids", "[2, 9]", "[2, 8]"]),
        ((X, jnp.zeros((2, 9))), TypeError, ["segment_ids", "integer", "float32"]),
        ((X, None, X), TypeError, ["cache", "MDNCache", "ArrayImpl"]),
        ((X, None, LAYER.init_cache(3)), ValueError, ["cache.state.s", "[2, 4, 8, 16]", "[3, 4"]),
        (
            (X, None, CACHE._replace(k_tail=None)),
            ValueError,
            ["cache.k_tail", "[2, 4, 16]", "got []"],
        ),
        (
            (X, None, CACHE._replace(v_tail=jnp.zeros((2, 3, 64)))),
            ValueError,
            ["cache.v_tail", "[2, 4, 64]", "[2, 3, 64]"],
        ),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error) as raised:
        LAYER(*arguments)
    for word in words:
        assert word in str(raised.value), str(raised.value)
