"""Streams: every document once a pass, none held out, each process its part, exact positions."""

import dataclasses
import json

import numpy as np
import pytest
from datasets.distributed import split_dataset_by_node

from mdn_jax.errors import RunError
from mdn_jax.models.loss import IGNORED
from mdn_jax.text.corpus import digest_of, place
from mdn_jax.text.tokenizer import DOCUMENT_START, ByteTokenizer, make_tokenizer
from tests.text.helpers import TEXTS, write_bpe, write_jsonl, write_parquet
from tests.train.data.helpers import data_of, texts_of
from tests.train.helpers import assert_identical
from train.config_sections import DataConfig
from train.data.stream import (
    _texts,
    _TextStream,
    from_json,
    held_out_of_stream,
    open_stream,
    packed_stream,
)

FRACTION = 0.1
HELD_OUT = [t for t in TEXTS if place(digest_of(t.encode())) < FRACTION]
TRAIN = [t for t in TEXTS if t not in HELD_OUT]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return data_of("stream", tmp_path_factory.mktemp("set"), held_out_fraction=FRACTION)


def batches(config, *, rows=1, length=8, seed=0, part=0, parts=1, tokenizer=None):
    return iter(
        packed_stream(
            open_stream(config),
            config,
            tokenizer or ByteTokenizer(),
            sequence_length=length,
            seed=seed,
            part=part,
            parts=parts,
        ).batch(rows)
    )


def documents_of(iterator, count):
    """The first documents of batches of one row, in their order."""
    documents = []
    while len(documents) <= count:
        for tokens in next(iterator)["tokens"]:
            for token in tokens.tolist():
                if token == DOCUMENT_START:
                    documents.append(b"")
                else:
                    documents[-1] += bytes([token])
    return [text.decode() for text in documents[:count]]


def test_a_pass_has_every_document_once_in_an_order_of_its_own(config):
    assert len(HELD_OUT) > 2
    config = dataclasses.replace(config, shuffle_buffer=len(TRAIN) // 5)
    assert len(TRAIN) % 5 == 0  # windows of the shuffle end where the passes do
    documents = documents_of(batches(config), 2 * len(TRAIN))
    passes = documents[: len(TRAIN)], documents[len(TRAIN) :]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(TRAIN)
    assert passes[0] != passes[1]
    assert passes[0] not in (TRAIN, sorted(TRAIN))
    assert documents_of(batches(config), len(TRAIN)) == passes[0]
    assert documents_of(batches(config, seed=1), len(TRAIN)) != passes[0]


def test_rows_are_full_and_documents_apart(config):
    iterator = batches(config, rows=3, length=16)
    for _ in range(40):
        batch = next(iterator)
        tokens, segments, targets = batch["tokens"], batch["segment_ids"], batch["targets"]
        assert {(x.shape, x.dtype.name) for x in batch.values()} == {((3, 16), "int32")}
        starts = tokens == DOCUMENT_START
        assert (np.diff(segments, axis=1) == starts[:, 1:]).all()
        following = np.where(starts[:, 1:], IGNORED, tokens[:, 1:])
        np.testing.assert_array_equal(targets[:, :-1], following)


def test_every_token_is_a_target_once(config):
    iterator = batches(config)
    count = 2 * sum(len(text) + 1 for text in TRAIN) // 8
    rows = [next(iterator) for _ in range(count)]
    tokens, targets = (np.concatenate([r[k][0] for r in rows]) for k in ("tokens", "targets"))
    ends = np.append(tokens[1:] == DOCUMENT_START, False)
    np.testing.assert_array_equal(targets[:-1], np.where(ends, IGNORED, np.roll(tokens, -1))[:-1])


@pytest.mark.parametrize("steps", [0, 1, 5, 17, 60, 150])
def test_a_position_is_exact(config, steps):
    straight = batches(config, rows=2)
    for _ in range(steps):
        next(straight)
    state = from_json(json.loads(json.dumps(straight.get_state())))
    expected = [next(straight) for _ in range(90)]
    resumed = batches(config, rows=2)
    resumed.set_state(state)
    for batch in expected:
        assert_identical(next(resumed), batch)
    resumed.set_state(state)  # and again, from somewhere else
    assert_identical(next(resumed), expected[0])


@pytest.mark.parametrize("parts", [2, 3])  # three files: a third of them each, or every other text
def test_the_parts_are_disjoint_and_all_there_is(config, parts):
    passes = []
    for part in range(parts):
        mine = split_dataset_by_node(open_stream(config), rank=part, world_size=parts)
        iterator = iter(_TextStream(mine, config, seed=0))
        texts = [[], [], []]
        while (number := iterator.get_state()["pass"]) < 2:
            text = next(iterator).decode()
            texts[iterator.get_state()["pass"]].append(text)
        assert number == 2
        passes.append(texts[:2])
    for number in range(2):
        assert sorted(t for texts in passes for t in texts[number]) == sorted(TRAIN)
    batch = next(batches(config, part=1, parts=parts))
    assert (batch["tokens"] != next(batches(config, part=0, parts=parts))["tokens"]).any()


def test_tokens_of_a_file(config, tmp_path):
    tokenizer = make_tokenizer(str(write_bpe(tmp_path / "bpe")), None)
    iterator = batches(config, rows=4, length=32, tokenizer=tokenizer)
    tokens = np.concatenate([next(iterator)["tokens"].ravel() for _ in range(40)])
    assert tokens[0] == 0  # <|endoftext|>
    texts = tokenizer.library.decode(tokens.tolist(), skip_special_tokens=False)
    assert set(texts.split("<|endoftext|>")[1:-1]) <= set(TRAIN)


def test_the_held_out_documents_are_the_same_for_any_order(config):
    documents, digest = held_out_of_stream(
        open_stream(config), config, ByteTokenizer(), tokens=1 << 30
    )
    assert documents.tokens == sum(len(text) + 1 for text in HELD_OUT)
    few, other = held_out_of_stream(open_stream(config), config, ByteTokenizer(), tokens=3)
    assert len(few) == 1
    assert other != digest
    iterator = batches(config, rows=8, length=64)
    seen = b" ".join(texts_of(next(iterator) for _ in range(20)))
    assert not any(f"{text} " in seen.decode(errors="replace") for text in HELD_OUT)


def test_local_files_by_their_format(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    config = DataConfig(
        dataset="json", files=(str(path),), shuffle_buffer=1, held_out_fraction=FRACTION
    )
    assert documents_of(batches(config), len(TRAIN)) == TRAIN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "/nowhere/at/all"}, r"data\.dataset: expected a data set with the split 'tr"),
        ({"split": "dev"}, r"data\.dataset: expected a data set with the split 'dev'"),
        ({"field": "body"}, r"data\.field: expected one of \['id', 'text'\].*, got 'body'"),
        ({"field": "id"}, r"data\.field: id: expected a string, got int in record 0 of"),
        ({"held_out_fraction": 1e-9}, r"data\.held_out_fraction: expected documents of"),
        ({"held_out_fraction": 1 - 1e-9}, r"data\.dataset: expected documents to train on"),
    ],
)
def test_what_is_wrong_is_named(config, changes, message):
    values = {**vars(config), **changes}
    with pytest.raises(RunError, match=message):
        open_and_read(DataConfig(**values))


def open_and_read(config):
    held_out_of_stream(open_stream(config), config, ByteTokenizer(), tokens=1 << 30)
    next(batches(config))


def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl")
    write_parquet(tmp_path / "b" / "data" / "train-0.parquet")
    for values in ({"dataset": "json", "files": ("~/a.jsonl",)}, {"dataset": "~/b"}):
        config = DataConfig(shuffle_buffer=1, held_out_fraction=FRACTION, **values)
        assert documents_of(batches(config), len(TRAIN)) == TRAIN


def test_half_a_surrogate_pair_is_named():
    config = DataConfig(dataset="somewhere")
    records = iter([{"text": "a"}, {"text": "b\ud83d"}])
    with pytest.raises(
        RunError, match=r"data\.field: text: expected text, .* surrogate pair.* in record 1 of"
    ):
        list(_texts(records, config))


def test_a_corrupt_record_is_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS * 30)
    data = path.read_text().splitlines()
    path.write_text("\n".join([*data[:-1], '{"text": "cut']))
    config = DataConfig(dataset="json", files=(str(path),))
    with pytest.raises(RunError, match=r"data\.dataset: expected .*json"):
        open_and_read(config)


def test_an_empty_stream_is_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [""])
    config = DataConfig(dataset="json", files=(str(tmp_path / "a.jsonl"),))
    with pytest.raises(RunError, match=r"data\.held_out_fraction: expected documents of json"):
        open_and_read(config)
