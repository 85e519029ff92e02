"""Records with parts: what is learned of them, how they are packed, what does not fit."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mdn_jax.errors import RunError
from mdn_jax.models.loss import IGNORED
from mdn_jax.text.records import Fields
from mdn_jax.text.tokenizer import ByteTokenizer, FileTokenizer
from tests.text.helpers import write_bpe
from tests.text.test_chat import CHATML
from tests.train.data.test_batches import read, run_of
from tests.train.helpers import assert_identical
from train.config_sections import DataConfig, SourceConfig
from train.data.batches import load_data
from train.data.documents import tokenize
from train.data.examples import make_encoder
from train.data.packing import PackedRows

PAIRS = [{"prompt": f"Q{i}?", "completion": "A" * (i % 7 + 1)} for i in range(60)]
CHATS = [
    {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "y" * 5}]}
    for i in range(40)
]
COMPLETIONS = {"field": "completion", "prompt": "prompt"}


def write(directory, kind, records):
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "jsonl":
        path = directory / "a.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return {"files": (str(path),)}
    path = directory / "data" / "train-0.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=9)
    if kind == "parquet":
        return {"files": (str(directory),)}
    return {"dataset": str(directory), "shuffle_buffer": 8}


def examples(config, tokenizer, records):
    fields = Fields(config.field, config.prompt, config.messages)
    return list(make_encoder(config, tokenizer)([fields.document(record) for record in records]))


def test_a_completion_is_learned_and_its_prompt_is_not():
    config = DataConfig(**COMPLETIONS)
    (example,) = examples(config, ByteTokenizer(), [{"prompt": "Qé?", "completion": "Äb"}])
    assert example.tokens.tolist() == [256, *"Qé?".encode(), *"Äb".encode()]
    assert example.learned.tolist() == [False] * 5 + [True] * 3
    assert example.size == 3


def test_tokens_of_a_completion_are_those_that_generation_gives(tmp_path):
    tokenizer = FileTokenizer(write_bpe(tmp_path / "bpe"))
    end = tokenizer.vocabulary.ids["<|endoftext|>"]
    record = {"prompt": "word1 wo", "completion": "rd2 <|endoftext|>"}
    (example,) = examples(DataConfig(**COMPLETIONS), tokenizer, [record])
    prompt, completion = (tokenizer.vocabulary.encode(text) for text in record.values())
    assert example.tokens.tolist() == [end, *prompt, *completion, end]  # and end once more
    assert end not in completion
    assert example.learned.tolist() == [False] * (1 + len(prompt)) + [True] * (len(completion) + 1)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "stream"])
def test_the_targets_are_the_completions(tmp_path, kind):
    data = DataConfig(**write(tmp_path / "d", kind, PAIRS), **COMPLETIONS)
    run = run_of(data, tmp_path / "run")
    batches, _ = read(run, 30)
    for batch in batches:
        learned = batch["targets"][batch["targets"] != IGNORED]
        assert set(learned.tolist()) == {ord("A")}
        before = batch["tokens"][batch["targets"] != IGNORED]
        assert set(before.tolist()) == {ord("?"), ord("A")}
    resumed, _ = read(run, 19, json.loads(json.dumps(read(run, 11)[1])))
    assert_identical(resumed, batches[11:])
    assert load_data(run).bytes_per_token == 1


def test_an_answer_stays_with_its_question():
    config, rng = DataConfig(**COMPLETIONS), np.random.default_rng(0)
    records = [
        {
            "prompt": "Q" * int(rng.integers(1, 20)),
            "completion": chr(128 + i) * int(rng.integers(1, 8)),
        }
        for i in range(80)
    ]
    fits = [len((r["prompt"] + r["completion"]).encode()) < 24 for r in records]
    short = [r["completion"] for r, x in zip(records, fits, strict=True) if x]
    assert 40 < len(short) < 80
    encoder = make_encoder(config, ByteTokenizer())
    texts = [Fields("completion", "prompt").document(record) for record in records]
    documents = tokenize(texts, ByteTokenizer(), encoder)
    rows = PackedRows(documents, batch_size=1, sequence_length=24, seed=0)
    found, learned_bytes = [], 0
    for step in range(rows.rows):
        (tokens,), (segments,), (targets,) = rows.batch(step).values()
        for segment in np.unique(segments):
            inside = segments == segment
            learned = bytes(targets[inside & (targets != IGNORED)].tolist())
            learned_bytes += len(learned)
            if learned:
                found.append(learned.decode(errors="replace"))
                assert tokens[inside][0] == 256 or found[-1] not in short
    assert sorted(x for x in found if x in short) == sorted(short)  # each once an epoch, whole
    total = sum(len(record["completion"].encode()) for record in records)
    assert learned_bytes == total  # and of the longer ones every part
    assert documents.targets.sum() == documents.size.sum() == total


def test_a_mixture_of_texts_and_records(tmp_path):
    (tmp_path / "a.txt").write_text("plain " * 60)
    pairs = SourceConfig(name="pairs", **write(tmp_path / "d", "jsonl", PAIRS), **COMPLETIONS)
    plain = SourceConfig(name="plain", files=(str(tmp_path / "a.txt"),))
    (batch, *_), _ = read(run_of(DataConfig(sources=(plain, pairs)), tmp_path / "run"), 1)
    assert ((batch["targets"] != IGNORED).sum(1) > 10).tolist().count(True) == 2


@pytest.mark.parametrize(
    ("records", "changes", "message"),
    [
        ([{"prompt": "a"}], {}, r"a\.jsonl:1: data\.field: expected one of \['prompt'\]"),
        ([{"prompt": 1, "completion": "a"}], {}, r"a\.jsonl:1: prompt: expected a string, got int"),
        ([{"prompt": "a", "completion": ""}], {}, r"expected files with text in them"),
        ([{"prompt": "a", "completion": "b"}], {}, r"expected two different records or more"),
        ([{"messages": "x"}], {"messages": "messages"}, r"messages: expected a list of messages"),
        (
            [{"messages": [{"role": "user"}]}],
            {"messages": "messages"},
            r"a\.jsonl:1: messages\[0\]: expected an object with the strings role and content",
        ),
    ],
)
def test_records_that_do_not_fit_are_named(tmp_path, records, changes, message):
    if changes:  # chats, which need a template
        pytest.importorskip("jinja2")
    (tmp_path / "t").write_text(CHATML)
    data = write(tmp_path / "d", "jsonl", records) | (changes or COMPLETIONS)
    if changes:
        data["chat_template"] = str(tmp_path / "t")
    with pytest.raises(RunError, match=message):
        load_data(run_of(DataConfig(**data), tmp_path / "run"))


def test_text_and_shards_have_no_parts(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    run = run_of(DataConfig(files=(str(tmp_path / "a.txt"),), **COMPLETIONS), tmp_path / "run")
    with pytest.raises(RunError, match=r"data\.files: expected JSONL or Parquet with data\.prompt"):
        load_data(run)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "stream"])
def test_the_targets_of_chats_are_what_the_assistant_says(tmp_path, kind):
    pytest.importorskip("jinja2")
    (tmp_path / "t.jinja").write_text(CHATML)
    data = DataConfig(
        **write(tmp_path / "d", kind, CHATS),
        messages="messages",
        chat_template=str(tmp_path / "t.jinja"),
    )
    run = run_of(data, tmp_path / "run", sequence_length=96)
    (batch, *_), _ = read(run, 1)
    rows = zip(batch["targets"], batch["segment_ids"], strict=True)
    said = [
        bytes(targets[(segments == segment) & (targets != IGNORED)].tolist()).decode()
        for targets, segments in rows
        for segment in np.unique(segments)
    ]
    whole = "yyyyy<|im_end|>\n"
    assert said.count(whole) >= 3
    assert all(x in whole for x in said)
    known = load_data(run)
    assert known.chat_template == CHATML
    (tmp_path / "t.jinja").write_text(CHATML.replace("<|im_start|>", "##"))
    assert load_data(run).fingerprint != known.fingerprint


def test_special_tokens_of_a_template_are_tokens_and_cannot_be_forged(tmp_path):
    pytest.importorskip("jinja2")
    directory = write_bpe(tmp_path / "bpe")
    template = "{% for m in messages %}<|endoftext|>{{ m.content }}{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)
    tokenizer = FileTokenizer(directory)
    config = DataConfig(messages="messages", tokenizer=str(directory))
    (example, *_) = examples(config, tokenizer, CHATS)
    end = tokenizer.vocabulary.ids["<|endoftext|>"]
    assert example.tokens.tolist().count(end) == 2  # it opens the document as well
    assert example.tokens[0] == end
    forged = {
        "messages": [*CHATS[0]["messages"], {"role": "assistant", "content": "<|endoftext|>"}]
    }
    with pytest.raises(RunError, match=r"data\.messages: expected messages without special tokens"):
        examples(config, tokenizer, [forged])
