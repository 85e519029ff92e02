"""The language model: golden vectors, caches, packed documents, dtypes, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mdn_jax import MDNForCausalLM
from mdn_jax.interop import model_from_official
from mdn_jax.layers import AttentionCache, MDNCache
from mdn_jax.testing import relative_error
from tests.layers.helpers import (
    BARE,
    INDEX,
    TINY,
    TINY_ATTENTION,
    assert_close,
    call,
    check_errors,
    golden,
    gradient_errors,
    normal,
)

T = 9
HYBRID = dataclasses.replace(TINY, attn=TINY_ATTENTION)
# "scan" compiles faster; the layer's tests run the default
MODEL = MDNForCausalLM(HYBRID, implementation="scan", rngs=nnx.Rngs(0))
WITHOUT_MLP = MDNForCausalLM(
    dataclasses.replace(BARE, attn=TINY_ATTENTION), implementation="scan", rngs=nnx.Rngs(0)
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, TINY.vocab_size, (2, T)), jnp.int32)


def mean_loss(logits, labels):
    """Mean cross entropy of the next token; labels of -100 do not count."""
    labels = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    counted = labels != -100
    scores = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(scores, jnp.where(counted, labels, 0)[..., None], axis=-1)
    return -jnp.where(counted, picked[..., 0], 0).sum() / counted.sum()


@nnx.jit
def loss_and_gradient(model, tokens, labels, segment_ids=None):
    def loss(model):
        return mean_loss(model(tokens, segment_ids)[0], labels)

    return nnx.value_and_grad(loss)(model)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_golden(dtype, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    about = INDEX["model"]["tiny_T50"]
    data, tensors = golden("model_tiny_T50")
    # the scan compiles faster; in float32 it is the default, what people run
    implementation = "scan" if dtype == "float64" else None
    model = model_from_official(
        about["config"], tensors, dtype=dtype, param_dtype=dtype, implementation=implementation
    )
    tokens = jnp.asarray(data["input_ids"])

    @nnx.jit  # one program for all that is compared
    def everything(model):
        def loss(model):
            hidden, _ = model.hidden(tokens)
            logits = model.logits(hidden)  # the call: test_hidden_and_logits_are_the_call
            return mean_loss(logits, tokens), (logits, hidden)

        return nnx.value_and_grad(loss, has_aux=True)(model)

    (loss, (logits, hidden)), gradients = everything(model)
    assert logits.dtype == dtype
    errors = {
        "logits": relative_error(logits, data["logits"]),
        "loss": relative_error(loss, data["loss"]),
        "loss_labels2": relative_error(mean_loss(logits, data["labels2"]), data["loss_labels2"]),
        "hidden": relative_error(hidden, data["hidden/2"]),
    }
    errors |= gradient_errors(model, gradients, data)
    check_errors(errors, dtype, about["fp32_rel_err"])


def check_split(model, split, max_length=None):
    logits, cache = call(model, TOKENS, None, model.init_cache(2, max_length))
    first, middle = call(model, TOKENS[:, :split], None, model.init_cache(2, max_length))
    second, last = call(model, TOKENS[:, split:], None, middle)
    assert_close((jnp.concatenate([first, second], axis=1), last), (logits, cache))


def test_splitting_is_one_call():
    check_split(WITHOUT_MLP, 6)


@pytest.mark.slow
@settings(max_examples=T - 1)
@given(split=st.integers(1, T - 1))
def test_splitting_anywhere_is_one_call(split):
    check_split(WITHOUT_MLP, split)


@pytest.mark.parametrize("max_length", [T, 3])
def test_decoding_in_a_compiled_loop(max_length):
    def windowed(size):
        attention = dataclasses.replace(TINY_ATTENTION, window_size=size)
        config = dataclasses.replace(BARE, attn=attention)
        return MDNForCausalLM(config, implementation="scan", rngs=nnx.Rngs(0))

    @nnx.jit
    def decode(model, tokens):
        graph, state = nnx.split(model)

        def step(cache, token):
            logits, cache = nnx.merge(graph, state)(token[:, None], None, cache)
            return cache, logits[:, 0]

        return jax.lax.scan(step, model.init_cache(2, max_length), tokens.T)

    cache, logits = decode(windowed(None), TOKENS)
    expected, _ = call(windowed(max_length + 1), TOKENS)
    assert_close(jnp.swapaxes(logits, 0, 1), expected)
    np.testing.assert_array_equal(cache[1].positions[:, -1], T - 1)


IDS = jnp.asarray([[0] * 4 + [1] * 5, [5] * 4 + [9] * 5], jnp.int32)


@pytest.mark.slow
def test_packed_documents_are_each_alone():
    logits, cache = call(WITHOUT_MLP, TOKENS, IDS)
    # as long as each other, so that one program serves both: what follows changes nothing
    first, _ = call(WITHOUT_MLP, TOKENS[:, :5])
    second, last = call(WITHOUT_MLP, TOKENS[:, 4:])
    assert_close(logits, jnp.concatenate([first[:, :4], second], axis=1))
    for ours, expected in zip(cache, last, strict=True):
        if isinstance(ours, MDNCache):
            assert_close(ours, expected)
    labels = TOKENS.at[:, 4].set(-100)  # the last token of a document predicts nothing
    loss, gradients = loss_and_gradient(WITHOUT_MLP, TOKENS, labels, IDS)
    pieces = (TOKENS[:, :5], labels[:, :5]), (TOKENS[:, 4:], TOKENS[:, 4:])
    losses, by_document = zip(*(loss_and_gradient(WITHOUT_MLP, *x) for x in pieces), strict=True)
    share = (3 / 7, 4 / 7)
    assert_close(loss, share[0] * losses[0] + share[1] * losses[1])
    assert_close(gradients, jax.tree.map(lambda a, b: share[0] * a + share[1] * b, *by_document))


def test_a_change_in_one_document_changes_no_other():
    changed = TOKENS.at[:, 2].set((TOKENS[:, 2] + 1) % TINY.vocab_size)
    before, after = call(WITHOUT_MLP, TOKENS, IDS)[0], call(WITHOUT_MLP, changed, IDS)[0]
    np.testing.assert_array_equal(before[:, 4:], after[:, 4:])
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert jnp.abs(before[:, 2:4] - after[:, 2:4]).min(axis=-1).min() > 0


def test_rows_are_independent():
    flipped = call(WITHOUT_MLP, TOKENS[::-1], IDS[::-1])
    expected = call(WITHOUT_MLP, TOKENS, IDS)
    assert_close(jax.tree.map(lambda x: x[::-1], flipped), expected, 1e-6)


def test_hidden_and_logits_are_the_call():
    @nnx.jit
    def in_two(model):
        h, cache = model.hidden(TOKENS)
        return h, (model.logits(h), cache)

    h, (logits, cache) = in_two(MODEL)
    assert h.shape == (2, T, TINY.hidden_size)
    assert_close((logits, cache), call(MODEL, TOKENS))
    assert isinstance(cache[0], MDNCache)
    assert isinstance(cache[1], AttentionCache)


@pytest.mark.parametrize("choice", ["states", "dots", "kernel", "block"])
def test_remat_changes_nothing(choice):
    remat = MDNForCausalLM(HYBRID, remat=choice, implementation="scan", rngs=nnx.Rngs(0))
    loss, gradients = loss_and_gradient(remat, TOKENS, TOKENS)
    expected_loss, expected = loss_and_gradient(MODEL, TOKENS, TOKENS)
    assert_close((loss, jax.tree.leaves(gradients)), (expected_loss, jax.tree.leaves(expected)))


def test_tied_embeddings():
    config = dataclasses.replace(BARE, tie_word_embeddings=True, num_hidden_layers=1)
    tied = MDNForCausalLM(config, implementation="scan", rngs=nnx.Rngs(0))
    assert tied.lm_head is None
    h = normal(0, 2, 3, TINY.hidden_size)
    assert_close(tied.logits(h), h @ tied.embeddings[...].T)
    _, gradients = loss_and_gradient(tied, TOKENS, TOKENS)
    unused = np.setdiff1d(np.arange(TINY.vocab_size), TOKENS)
    assert jnp.abs(gradients["embeddings"][...][unused]).max() > 0


def test_initialisation():
    model = MDNForCausalLM(
        dataclasses.replace(TINY, vocab_size=2000, initializer_range=0.03), rngs=nnx.Rngs(0)
    )
    for table in (model.embeddings, model.lm_head):
        assert abs(float(table[...].std()) / 0.03 - 1) < 0.02
    np.testing.assert_array_equal(model.norm.scale[...], 1)
    kernels = [layer.mlp.up_proj.kernel[...] for layer in model.layers]
    assert relative_error(kernels[0], kernels[1]) > 0.5  # every layer has its own draw
    for kernel in kernels:
        assert abs(float(kernel.std()) / 0.03 - 1) < 0.1


def test_bfloat16():
    low = MDNForCausalLM(HYBRID, implementation="scan", dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    logits, _ = call(low, TOKENS)
    assert logits.dtype == jnp.float32
    assert nnx.eval_shape(lambda m: m.hidden(TOKENS)[0], low).dtype == jnp.bfloat16
    assert relative_error(logits, call(MODEL, TOKENS)[0]) < 5e-2
    _, gradients = nnx.eval_shape(loss_and_gradient, low, TOKENS, TOKENS)
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}


def test_the_embedding_gradient_of_a_frequent_token_is_not_rounded_away():
    model = MDNForCausalLM(TINY, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model.layers = nnx.List([])
    model.norm = lambda h: h
    tokens = jnp.zeros((1, 4096), jnp.int32)  # a bfloat16 sum of ones would stop at 256
    gradient = nnx.grad(lambda m: m.hidden(tokens)[0].sum().astype(jnp.float32))(model)
    np.testing.assert_array_equal(gradient["embeddings"][...][0], 4096.0)


CACHE = MODEL.init_cache(2)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((TOKENS[0],), ValueError, ["tokens", "[B, T]", "[9]"]),
        ((TOKENS[:, :0],), ValueError, ["tokens", ">= 1", "[2, 0]"]),
        ((TOKENS.astype(jnp.float32),), TypeError, ["tokens", "integer", "float32"]),
        (([1, 2],), TypeError, ["tokens", "array", "list"]),
        ((TOKENS, IDS[:, :8]), ValueError, ["segment_ids", "[2, 9]", "[2, 8]"]),
        ((TOKENS, IDS > 3), TypeError, ["segment_ids", "integer", "bool"]),
        ((TOKENS > 3,), TypeError, ["tokens", "integer", "bool"]),
        ((TOKENS, None, CACHE[0].state.s), TypeError, ["cache", "tuple", "ArrayImpl"]),
        ((TOKENS, None, CACHE[:1]), ValueError, ["cache", "2 entries", "got 1"]),
        ((TOKENS, None, CACHE[::-1]), TypeError, ["cache", "MDNCache", "AttentionCache"]),
        (
            (TOKENS[:1], None, CACHE),
            ValueError,
            ["cache.state.s", "[1, 2, 8, 16]", "[2, 2, 8, 16]"],
        ),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error) as raised:
        MODEL(*arguments)
    for word in words:
        assert word in str(raised.value), str(raised.value)
