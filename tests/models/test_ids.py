"""Segment ids and token ids of any values, through every kind of layer at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MDNForCausalLM
from mdn_jax.analysis.layers import record_layers
from tests.layers.helpers import BARE, TINY, TINY_ATTENTION, assert_close, call

CONFIG = dataclasses.replace(
    BARE,
    num_hidden_layers=3,
    other_mixer="kda",
    other_layers=(1,),
    attn=dataclasses.replace(TINY_ATTENTION, layers=(2,)),
)
MODEL = MDNForCausalLM(CONFIG, implementation="scan", rngs=nnx.Rngs(0))
ROWS, T, DOCUMENT = 2, 8, 2  # shorter than the taps of the convolutions
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, TINY.vocab_size, (ROWS, T)), jnp.int32)

IDS = {
    "back within the taps": np.array([4, 9, 4, -7], np.int32),
    "ends of int8": np.array([-128, 127, -128, 127], np.int8),
    "falling, unsigned": np.array([255, 3, 255, 0], np.uint8),
    "ends of uint32": np.array([2**32 - 1, 0, 2**31, 0], np.uint32),
    "the same in 32 bits": np.array([5, 2**32 + 5, 5, 2**33 + 5], np.int64),
}


def ids_of(name):
    return np.repeat(IDS[name], DOCUMENT)[None].repeat(ROWS, axis=0)


@nnx.jit
def value_and_gradient(model, tokens, ids=None):
    def loss(model):
        logits, _ = model(tokens, segment_ids=ids)
        return jnp.sum(jnp.sin(logits)), logits

    return nnx.value_and_grad(loss, has_aux=True)(model)


def test_a_change_starts_a_document_whatever_the_ids():
    expected, _ = call(MODEL, TOKENS.reshape(-1, DOCUMENT))  # every document in a row of its own
    expected = expected.reshape(ROWS, T, -1)
    for name in IDS:
        assert_close(MODEL(TOKENS, segment_ids=ids_of(name))[0], expected)
    for name in ("back within the taps", "ends of int8"):
        assert_close(call(MODEL, TOKENS, jnp.asarray(ids_of(name)))[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["back within the taps", "ends of int8"])
def test_gradients_see_the_same_documents(name):
    (loss, _), gradient = value_and_gradient(MODEL, TOKENS.reshape(-1, DOCUMENT))
    (ours, _), our_gradient = value_and_gradient(MODEL, TOKENS, jnp.asarray(ids_of(name)))
    assert_close((ours, our_gradient), (loss, gradient))


UNKNOWN = {
    "the next one": np.int32(TINY.vocab_size),
    "the last one from behind": np.int32(-1),
    "the first one from behind": np.int32(-TINY.vocab_size),
    "the lowest": np.int32(-(2**31)),
    "int8": np.int8(-3),
    "uint8": np.uint8(255),
    "a token in 32 bits": np.int64(2**32 + 3),
}


def with_token(token, *places):
    tokens = np.asarray(TOKENS).astype(token.dtype)
    for place in places:
        tokens[place] = token
    return tokens


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_token_is_nan_to_the_end_of_its_document(name):
    token = UNKNOWN[name]
    expected, _ = call(MODEL, TOKENS.at[0, 5].set(0))
    logits, cache = MODEL(with_token(token, (0, 5)))
    assert jnp.isnan(logits[0, 5:]).all()
    assert_close((logits[0, :5], logits[1]), (expected[0, :5], expected[1]))
    # what goes on from there is nan too, the other row is not
    after, _ = MODEL(TOKENS, None, cache)
    assert jnp.isnan(after[0]).all()
    assert jnp.isfinite(after[1]).all()


def test_an_unknown_token_leaves_other_documents_alone():
    ids = jnp.asarray([[3, 3, 3, 7, 7, 3, 3, 3]] * ROWS)
    expected, state = call(MODEL, TOKENS.at[0, 1].set(0), ids)
    logits, cache = call(MODEL, TOKENS.at[0, 1].set(-1), ids)
    np.testing.assert_array_equal(jnp.isnan(logits[0]).all(axis=-1), [0, 1, 1, 0, 0, 0, 0, 0])
    assert_close(jnp.where(jnp.isnan(logits), expected, logits), expected, 0)
    assert_close(cache, state, 0)


@pytest.mark.slow
def test_an_unknown_token_makes_the_loss_and_the_gradient_nan():
    (loss, _), gradient = value_and_gradient(MODEL, TOKENS.at[1, 6].set(-2), jnp.zeros_like(TOKENS))
    assert jnp.isnan(loss)
    assert jnp.isnan(gradient["layers"][0]["mixer"]["q_proj"]["kernel"][...]).any()


LENGTHS = jnp.asarray([3, T])


def padded_with(token):
    return TOKENS.at[0, 3:].set(token).at[0, 4].set(-100)


def test_padding_may_hold_any_ids():
    run = nnx.jit(lambda model, tokens: model(tokens, lengths=LENGTHS))
    expected, state = run(MODEL, TOKENS)
    for token in (-1, -(2**31), 2**31 - 1, TINY.vocab_size):
        logits, cache = run(MODEL, padded_with(token))
        assert_close((logits[0, :3], logits[1], cache), (expected[0, :3], expected[1], state), 0)
    # but the last token of its own is not padding
    logits, _ = run(MODEL, TOKENS.at[0, 2].set(-1))
    assert jnp.isnan(logits[0, 2]).all()


@pytest.mark.slow
def test_padding_of_any_ids_is_not_in_the_gradient():
    @nnx.jit
    def run(model, tokens):
        def loss(model):
            logits, _ = model(tokens, lengths=LENGTHS)
            own = jnp.arange(T) < LENGTHS[:, None]
            return jnp.sum(jnp.where(own[:, :, None], jnp.sin(logits), 0.0))

        return nnx.value_and_grad(loss)(model)

    expected = run(MODEL, TOKENS)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(expected))
    for token in (-1, 2**31 - 1):
        assert_close(run(MODEL, padded_with(token)), expected, 0)


def test_the_record_of_an_unknown_token():
    records, _ = nnx.jit(record_layers)(MODEL, TOKENS.at[0, 4].set(-1))
    assert jnp.isnan(records[0].gates.beta[0, 4]).all()
    assert jnp.isfinite(records[0].gates.beta[1]).all()
