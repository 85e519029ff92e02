"""Rows of different lengths in one batch: padding leaves no trace."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MDNState, MomentumDeltaNet, momentum_delta_rule
from mdn_jax.layers import SoftmaxAttention
from mdn_jax.testing import random_inputs
from tests.layers.helpers import TINY, assert_close, call, normal

T = 7
LAYERS = {
    "mdn": MomentumDeltaNet(
        dataclasses.replace(TINY, use_p_times_alpha=False), implementation="scan", rngs=nnx.Rngs(0)
    ),
    "full": SoftmaxAttention(32, 4, num_kv_heads=2, initializer_range=0.3, rngs=nnx.Rngs(0)),
    "windowed": SoftmaxAttention(32, 4, window_size=4, initializer_range=0.3, rngs=nnx.Rngs(0)),
}


@nnx.jit
def padded_call(layer, x, cache, lengths):
    return layer(x, None, cache, lengths)


def rows(tree, *picked):
    return jax.tree.map(lambda x: x[jnp.asarray(picked)], tree)


def poisoned(x, lengths):
    """Noise where the padding is."""
    noise = 50 * normal(9, *x.shape)
    return jnp.where(jnp.arange(x.shape[1])[:, None] < lengths[:, None, None], x, noise)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("before", [0, 3])
def test_a_padded_row_is_the_row_alone(layer, before):
    x, lengths = normal(1, 4, T, 32), jnp.asarray([0, 1, 4, T])
    start = layer.init_cache(4)
    if before:
        _, start = call(layer, normal(2, 4, before, 32))
    y, cache = padded_call(layer, poisoned(x, lengths), start, lengths)
    for row, length in enumerate(lengths.tolist()):
        own = rows(cache, row)
        expected = rows(start, row)
        if length:
            alone, expected = call(layer, x[row : row + 1, :length], None, rows(start, row))
            assert_close(y[row : row + 1, :length], alone)
        if isinstance(layer, SoftmaxAttention):  # in the batch, with empty entries before
            entries = own.k.shape[1]
            expected = dataclasses.replace(expected.resized(entries), capacity=own.capacity)
        assert_close(own, expected)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_padding_that_is_not_finite_leaves_no_trace(layer):
    lengths = jnp.asarray([0, 1, 4, T])
    own = jnp.arange(T)[:, None] < lengths[:, None, None]
    _, start = call(layer, normal(2, 4, 3, 32))

    @nnx.jit
    def run(layer, x):
        def loss(layer, x, cache):
            y, cache = layer(x, None, cache, lengths)
            return jnp.sum(jnp.where(own, y, 0.0) ** 2), cache

        return nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x, start)

    x = normal(1, 4, T, 32)
    expected = run(layer, jnp.where(own, x, 0.0))
    for value in (jnp.nan, -jnp.inf, 3e38):
        assert_close(run(layer, jnp.where(own, x, value)), expected, 0)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_prefill_and_decoding_are_one_call_at_every_split(layer):
    x = normal(1, 1, T, 32)
    start = layer.init_cache(1) if layer is LAYERS["mdn"] else layer.init_cache(1, T)
    y, last = call(layer, x, None, start)
    for split in range(T + 1):
        outputs, cache = padded_call(layer, x, start, jnp.asarray([split]))
        outputs = outputs[:, :split]
        for t in range(split, T):
            one, cache = call(layer, x[:, t : t + 1], None, cache)
            outputs = jnp.concatenate([outputs, one], axis=1)
        assert_close((outputs, cache), (y, last))


@pytest.mark.parametrize("implementation", ["scan", "xla"])
def test_the_operator_at_every_split(implementation):
    inputs = random_inputs(seed=3, batch=1, length=T, key_dim=8, value_dim=8, initial_state=False)

    @jax.jit
    def rule(inputs, state):
        return momentum_delta_rule(**inputs, initial_state=state, implementation=implementation)

    start = MDNState.zeros(1, 2, 8, 8)
    expected = rule(inputs, start)
    for split in range(T + 1):
        state, outputs = start, []
        pieces = [slice(0, split)] * (split > 0) + [slice(t, t + 1) for t in range(split, T)]
        for piece in pieces:
            o, state = rule({name: x[:, piece] for name, x in inputs.items()}, state)
            outputs.append(o)
        assert_close((jnp.concatenate(outputs, axis=1), state), expected)


def test_a_resized_cache():
    _, cache = call(LAYERS["full"], normal(0, 2, 5, 32))
    smaller, larger = cache.resized(3), cache.resized(8)
    np.testing.assert_array_equal(smaller.positions, [[2, 3, 4]] * 2)
    np.testing.assert_array_equal(larger.positions, [[-1, -1, -1, 0, 1, 2, 3, 4]] * 2)
    np.testing.assert_array_equal(larger.k[:, 3:], cache.k)
    np.testing.assert_array_equal(smaller.v, cache.v[:, 2:])
    assert (smaller.capacity, larger.capacity) == (3, 8)


X = normal(0, 2, T, 32)


@pytest.mark.parametrize(
    ("lengths", "segment_ids", "error", "words"),
    [
        (jnp.asarray([1, T + 1]), None, ValueError, ["lengths", "from 0 to T = 7", "got 8"]),
        (jnp.asarray([-1, 1]), None, ValueError, ["lengths", "got -1"]),
        (jnp.asarray([1]), None, ValueError, ["lengths", "[B] = [2]", "shape [1]"]),
        (jnp.asarray([1.0, 2.0]), None, TypeError, ["lengths", "integers", "float32"]),
        ([1, 2], None, TypeError, ["lengths", "integers", "list"]),
        (jnp.asarray([1, 2]), jnp.zeros((2, T), int), ValueError, ["lengths", "segment_ids"]),
    ],
)
@pytest.mark.parametrize("layer", [LAYERS["mdn"], LAYERS["full"]], ids=["mdn", "full"])
def test_bad_lengths(layer, lengths, segment_ids, error, words):
    with pytest.raises(error) as raised:
        layer(X, segment_ids, None, lengths)
    for word in words:
        assert word in str(raised.value), str(raised.value)
