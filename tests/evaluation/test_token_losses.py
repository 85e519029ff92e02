"""Losses of single tokens and the rows they are measured on, against plain numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.errors import RunError
from mdn_jax.evaluation.token_losses import packed_rows, strided_rows, token_losses
from mdn_jax.models.loss import IGNORED
from mdn_jax.text.tokenizer import encode
from tests.layers.helpers import call
from tests.tiny import TINY_MODEL
from tests.train.helpers import byte_documents
from train.data.packing import held_out_batches


@pytest.fixture(scope="module")
def model():
    config = MDNConfig(**TINY_MODEL | {"initializer_range": 0.3})
    return MDNForCausalLM(config, implementation="scan", rngs=nnx.Rngs(0))


def naive(model, tokens):
    """Losses of `tokens[1:]`, each document alone, float64."""
    padded = np.zeros((1, 64), np.int32)  # one shape to compile; nothing is seen from behind
    padded[0, : len(tokens) - 1] = tokens[:-1]
    logits = np.asarray(call(model, jnp.asarray(padded))[0][0, : len(tokens) - 1], np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    normalised = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -normalised[np.arange(len(tokens) - 1), tokens[1:]]


DOCUMENTS = [encode(text).tolist() for text in (b"one two three", b"x", b"four five, 6")]


def test_held_out_documents_without_a_target_are_refused():
    documents = byte_documents([b"", b""])
    with pytest.raises(RunError, match=r"^data.held_out_fraction: .* of more than one token"):
        held_out_batches(documents, batch_size=2, sequence_length=8, max_rows=2)


def test_losses_of_packed_documents(model):
    rows = packed_rows(DOCUMENTS, width=9)
    losses = list(token_losses(model, rows, batch_size=2, width=9))
    assert [len(x) for x in losses] == [len(row.tokens) for row in rows]
    # a width of all tokens: every document as if it were alone
    (row,) = packed_rows(DOCUMENTS, width=64)
    (loss,) = token_losses(model, [row], batch_size=1, width=64)
    expected = np.concatenate([naive(model, document) for document in DOCUMENTS])
    np.testing.assert_allclose(loss[row.targets != IGNORED], expected, rtol=2e-5)
    np.testing.assert_array_equal(loss[row.targets == IGNORED], 0)


def test_losses_of_windows(model):
    rows = list(strided_rows(DOCUMENTS, width=6, stride=4))
    losses = list(token_losses(model, rows, batch_size=3, width=6))
    scored = [loss[row.targets != IGNORED] for row, loss in zip(rows, losses, strict=True)]
    expected = []
    for document in DOCUMENTS:
        count = len(document) - 1
        done = 0
        for start in range(0, count, 4):
            stop = min(start + 6, count)
            expected.append(naive(model, document[start : stop + 1])[done - start :])
            done = stop
            if stop == count:
                break
    assert list(map(len, scored)) == list(map(len, expected))
    np.testing.assert_allclose(np.concatenate(scored), np.concatenate(expected), rtol=2e-5)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 12), st.integers(1, 12))
def test_every_token_is_a_target_once(lengths, width, stride):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 99, n).tolist() for n in lengths]
    expected = [token for document in documents for token in document[1:]]
    strided = strided_rows(documents, width=width, stride=min(stride, width))
    for rows in (list(strided), packed_rows(documents, width=width)):
        targets = [row.targets[row.targets != IGNORED] for row in rows]
        assert np.concatenate([[], *targets]).tolist() == expected
        for row in rows:
            assert len(row.tokens) == len(row.targets) <= width


def test_packed_rows_are_those_of_the_held_out_loss():
    texts = [b"one two three", b"x", b"four five, 6"]
    (batch,) = held_out_batches(byte_documents(texts), batch_size=4, sequence_length=9, max_rows=99)
    for i, row in enumerate(packed_rows(DOCUMENTS, width=9)):
        count = len(row.tokens)
        np.testing.assert_array_equal(batch["tokens"][i, :count], row.tokens)
        np.testing.assert_array_equal(batch["targets"][i, :count], row.targets)
