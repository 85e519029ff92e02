import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.errors import RunError
from mdn_jax.models.loss import IGNORED
from mdn_jax.text.tokenizer import DOCUMENT_START, decode, encode
from tests.tiny import TINY_MODEL
from tests.train.helpers import byte_documents
from train.data.packing import PackedRows, held_out_batches, unigram_entropy

DOCUMENTS = [bytes([65 + i]) * (3 + 7 * i % 20) for i in range(12)]


def packed(**changes):
    options = {"batch_size": 3, "sequence_length": 8, "seed": 0} | changes
    return PackedRows(byte_documents(DOCUMENTS), **options)


def test_bytes_come_back():
    text = "naïve = '→'\n"
    assert encode(text.encode())[0] == DOCUMENT_START
    assert decode(encode(text.encode())) == text
    assert decode([0xC3]) == "\ufffd"


def test_a_batch_depends_on_seed_and_step_alone():
    straight = [packed().batch(step) for step in range(30)]
    for step in (29, 3, 17):
        for key, value in packed().batch(step).items():
            np.testing.assert_array_equal(value, straight[step][key])
    assert any(
        (packed(seed=1).batch(s)["tokens"] != b["tokens"]).any() for s, b in enumerate(straight)
    )


def test_shapes_and_types():
    batch = packed().batch(0)
    assert set(batch) == {"tokens", "segment_ids", "targets"}
    assert {(x.shape, x.dtype.name) for x in batch.values()} == {((3, 8), "int32")}


def test_an_epoch_visits_every_target_once():
    rows = packed(batch_size=1)
    targets = np.concatenate([rows.batch(step)["targets"] for step in range(rows.rows)])
    kept = np.sort(targets[targets != IGNORED])
    everything = np.sort(np.frombuffer(b"".join(DOCUMENTS), np.uint8))
    assert len(everything) - len(kept) < 8  # the last row is cut off
    counts = np.bincount(everything, minlength=256) - np.bincount(kept, minlength=256)
    assert counts.min() >= 0
    other = [rows.batch(step)["tokens"] for step in range(rows.rows, 2 * rows.rows)]
    first = [rows.batch(step)["tokens"] for step in range(rows.rows)]
    assert sorted(x.tobytes() for x in other) == sorted(x.tobytes() for x in first)
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_no_target_crosses_a_document():
    for step in range(20):
        batch = packed().batch(step)
        tokens, segments, targets = batch["tokens"], batch["segment_ids"], batch["targets"]
        assert (np.diff(segments, axis=1) == (tokens[:, 1:] == DOCUMENT_START)).all()
        starts = tokens[:, 1:] == DOCUMENT_START
        assert (targets[:, :-1][starts] == IGNORED).all()
        np.testing.assert_array_equal(targets[:, :-1][~starts], tokens[:, 1:][~starts])
        assert (targets != DOCUMENT_START).all()
        # every document is one letter: within a segment all tokens and targets agree
        for row in range(len(tokens)):
            for segment in np.unique(segments[row]):
                inside = segments[row] == segment
                letters = {*tokens[row][inside], *targets[row][inside]} - {DOCUMENT_START, IGNORED}
                assert len(letters) <= 1


@pytest.fixture
def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(97, 123, 3 + 5 * i, dtype=np.uint8).tobytes() for i in range(4)]


@pytest.mark.slow
def test_packed_training_is_that_of_separate_documents(documents):
    """One row of all documents, and a row each: the same loss, the same gradient."""
    config = MDNConfig(**TINY_MODEL | {"initializer_range": 0.2})
    model = MDNForCausalLM(config, implementation="xla", rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)

    @jax.jit
    @jax.value_and_grad
    def summed(params, batch):
        model = nnx.merge(graph, params)
        logits, _ = model(batch["tokens"], segment_ids=batch["segment_ids"])
        counted = batch["targets"] != IGNORED
        likelihood = jax.nn.log_softmax(logits)
        chosen = jnp.where(counted, batch["targets"], 0)[..., None]
        return -jnp.sum(jnp.take_along_axis(likelihood, chosen, -1)[..., 0] * counted)

    tokens = sum(len(text) + 1 for text in documents)
    packed = PackedRows(
        byte_documents(documents), batch_size=1, sequence_length=tokens - 1, seed=0
    ).batch(0)
    assert len(np.unique(packed["segment_ids"])) == 4
    # of one shape, with three rows and with tokens that do not count: compiled once
    filling = {"tokens": 0, "segment_ids": 0, "targets": IGNORED}
    rows = {name: np.full((4, tokens - 1), x, np.int32) for name, x in filling.items()}
    apart = {name: x.copy() for name, x in rows.items()}
    for name, x in rows.items():
        x[:1] = packed[name]
    loss, gradient = summed(params, rows)
    for i, text in enumerate(documents):
        apart["tokens"][i, : len(text)] = encode(text)[:-1]
        apart["targets"][i, : len(text)] = encode(text)[1:]
    expected, expected_gradient = summed(params, apart)
    assert (packed["targets"] != IGNORED).sum() == (apart["targets"] != IGNORED).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for ours, theirs in zip(*map(jax.tree.leaves, (gradient, expected_gradient)), strict=True):
        assert np.abs(theirs).max() > 0
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_too_little_text_is_named():
    with pytest.raises(RunError, match=r"data\.files: expected at least .* = 9 tokens.*got 4"):
        PackedRows(byte_documents([b"abc"]), batch_size=1, sequence_length=8, seed=0)


def test_held_out_covers_every_byte_once():
    batches = held_out_batches(
        byte_documents(DOCUMENTS), batch_size=4, sequence_length=8, max_rows=1000
    )
    targets = np.concatenate([batch["targets"] for batch in batches])
    assert all(batch["tokens"].shape == (4, 8) for batch in batches)
    assert bytes(targets[targets != IGNORED].tolist()) == b"".join(DOCUMENTS)


def test_held_out_rows_are_capped_at_even_distances():
    every = held_out_batches(
        byte_documents(DOCUMENTS), batch_size=1, sequence_length=8, max_rows=1000
    )
    some = held_out_batches(byte_documents(DOCUMENTS), batch_size=1, sequence_length=8, max_rows=4)
    step = len(every) / 4
    for i, batch in enumerate(some):
        np.testing.assert_array_equal(batch["tokens"], every[math.floor(i * step)]["tokens"])
    assert len(some) == 4


def test_a_short_held_out_text_is_padded_without_targets():
    (batch,) = held_out_batches(
        byte_documents([b"ab"]), batch_size=2, sequence_length=8, max_rows=9
    )
    assert batch["targets"][batch["targets"] != IGNORED].tolist() == [97, 98]
    assert (np.diff(batch["segment_ids"], axis=1) >= 0).all()


def test_unigram_entropy():
    batches = held_out_batches(
        byte_documents([b"aabb", b"cccc"]), batch_size=1, sequence_length=4, max_rows=99
    )
    assert unigram_entropy(batches) == pytest.approx(1.5 * math.log(2))


def test_documents_with_nothing_to_predict_are_refused():
    (alone,) = byte_documents([b"abcdef"]).cut(0.1)[1:]  # one token, as a small shard is cut
    assert alone.tokens == 1
    options = {"batch_size": 2, "sequence_length": 4}
    with pytest.raises(RunError, match=r"data\.held_out_fraction: expected .*, got 1 of 1 "):
        held_out_batches(alone, max_rows=8, **options)
    several = byte_documents([b""] * 9 + [b"long enough"])
    with pytest.raises(RunError, match=r"data\.held_out_fraction: expected .*, got 9 of 9 "):
        held_out_batches(several[several.length == 1], max_rows=8, **options)
    with pytest.raises(RunError, match=r"data\.held_out_fraction: expected .*, got 10 of 21 "):
        held_out_batches(several, max_rows=1, **options)  # the row that is measured has none
    assert len(held_out_batches(several, max_rows=8, **options)) == 3
    with pytest.raises(RunError, match=r"data\.files: expected documents to train on of more than"):
        PackedRows(several[several.length == 1], seed=0, **options)
    assert PackedRows(several, seed=0, **options).rows == 5
