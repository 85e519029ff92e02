"""Batches of every kind of source: positions, processes, waiting, and what does not fit."""

import dataclasses
import json
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from mdn_jax import MDNConfig
from mdn_jax.errors import RunError
from mdn_jax.text import corpus, files
from mdn_jax.text.corpus import digest_of, place
from mdn_jax.text.tokenizer import ByteTokenizer, FileTokenizer
from tests.text.helpers import TEXTS, write_bpe
from tests.tiny import TINY_MODEL
from tests.train.data.helpers import data_of
from tests.train.helpers import TINY_RUN, assert_identical
from train.config import TrainConfig
from train.config_sections import DataConfig, OptimizerConfig
from train.data.batches import load_data
from train.data.packing import PackedRows
from train.data.sources import find_source
from train.parallel.sharding import Share
from train.run import Run, check_tokenizer, fit_vocabulary

KINDS = ["text", "jsonl", "parquet", "tokens", "stream"]
ALONE = Share(0, 1)


def run_of(data, directory, vocab_size=300, **changes):
    return TrainConfig(
        output_dir=str(directory),
        model=MDNConfig(**TINY_MODEL | {"vocab_size": vocab_size}),
        data=data,
        optimizer=OptimizerConfig(warmup_steps=1),
        **TINY_RUN | changes,
    )


def read(run, count, position=None, share=ALONE):
    with load_data(run).batches(share, position) as batches:
        return [next(batches) for _ in range(count)], batches.position()


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_position_is_exact(tmp_path, kind, tokenizer):
    name = None if tokenizer == "bytes" else str(write_bpe(tmp_path / "bpe"))
    run = run_of(data_of(kind, tmp_path / "data", tokenizer=name), tmp_path / "run")
    straight, end = read(run, 30)
    assert {x.shape for x in straight[0].values()} == {(4, 16)}
    _, position = read(run, 11)
    resumed, again = read(run, 19, json.loads(json.dumps(position)))
    assert_identical(resumed, straight[11:])
    assert again == end
    assert end["step"] == 30
    other = dataclasses.replace(run, seed=1)
    pairs = zip(read(other, 30)[0], straight, strict=True)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in pairs)


def test_a_position_is_what_was_taken_and_not_what_was_prepared(tmp_path):
    run = run_of(data_of("stream", tmp_path / "data", prefetch=8), tmp_path / "run")
    with load_data(run).batches(ALONE) as batches:
        next(batches)
        time.sleep(0.3)
        position = batches.position()
        expected = next(batches)
    assert_identical(read(run, 1, position)[0], [expected])


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_each_process_has_its_rows(tmp_path, kind, parts):
    run = run_of(data_of(kind, tmp_path / "data"), tmp_path / "run")
    whole, position = read(run, 12)
    shares = [read(run, 12, share=Share(part, parts)) for part in range(parts)]
    for step, batch in enumerate(whole):
        for key, rows in batch.items():
            mine = [share[0][step][key] for share in shares]
            assert all(len(x) == 4 // parts for x in mine)
            np.testing.assert_array_equal(np.concatenate(mine), rows)
    assert all(share[1] == position for share in shares)  # any number of them can go on
    resumed, _ = read(run, 2, shares[1][1], Share(0, 1))
    assert_identical(resumed, read(run, 14)[0][12:])


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_a_process_reads_no_rows_but_its_own(tmp_path, kind, monkeypatch):
    run = run_of(data_of(kind, tmp_path / "data", prefetch=1), tmp_path / "run")
    asked = []
    batch = PackedRows.batch

    def recorded(self, step, rows):
        asked.append((step, rows))
        return batch(self, step, rows)

    monkeypatch.setattr(PackedRows, "batch", recorded)
    read(run, 3, share=Share(1, 4))
    assert {rows for _, rows in asked} == {slice(1, 2)}
    assert [step for step, _ in asked][:3] == [0, 1, 2]


def test_a_stream_goes_on_in_as_many_parts_as_it_was(tmp_path):
    run = run_of(data_of("stream", tmp_path / "data"), tmp_path / "run")
    _, position = read(run, 2)
    with pytest.raises(RunError, match=r"distributed: expected the 1 parts .*, got 2; only files"):
        load_data(run).batches(Share(0, 2), position)


def one_of_two_processes(index, place, directory, output):
    """Reads a part of a stream, and again from a position in the middle; prints what came."""
    jax.distributed.initialize(place, 2, index)
    run = run_of(DataConfig(dataset=directory, shuffle_buffer=16), output)
    share = Share(index, 2)
    with load_data(run).batches(share) as batches:
        first = [next(batches) for _ in range(7)]
        position = json.loads(json.dumps(batches.position()))
        expected = [next(batches) for _ in range(7)]
    with load_data(run).batches(share, position) as batches:
        assert_identical([next(batches) for _ in range(7)], expected)
    print(json.dumps([position, [batch["tokens"].tolist() for batch in first + expected]]))


@pytest.mark.slow
def test_two_processes_go_on_with_a_stream(tmp_path):
    directory = data_of("stream", tmp_path / "data").dataset
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = [(i, place, directory, str(tmp_path / "run")) for i in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import *; one_of_two_processes(*{a!r})"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for a in arguments
    ]
    out = [process.communicate(timeout=100)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    (position, rows), (other, other_rows) = (json.loads(lines[-1]) for lines in out)
    assert position == other
    assert position["step"] == 7
    assert len(position["parts"]) == 2
    assert position["parts"][0] != position["parts"][1]
    assert np.shape(rows) == np.shape(other_rows) == (14, 2, 16)
    assert rows != other_rows


def test_preparation_goes_on_during_a_step_and_waiting_is_counted(tmp_path, monkeypatch):
    batch = PackedRows.batch

    def slow(self, step, rows):
        time.sleep(0.03)
        return batch(self, step, rows)

    monkeypatch.setattr(PackedRows, "batch", slow)
    run = run_of(data_of("jsonl", tmp_path / "data"), tmp_path / "run")
    with load_data(run).batches(ALONE) as batches:
        began = time.perf_counter()
        for _ in range(10):
            next(batches)
        alone = time.perf_counter() - began
        assert alone > 0.1
        assert 0.9 * alone < batches.waited <= alone
        before = batches.waited
        for _ in range(10):
            time.sleep(0.06)  # a step
            next(batches)
        assert batches.waited - before < 0.2 * 10 * 0.06


@pytest.mark.parametrize("kind", KINDS)
def test_threads_end_with_the_run(tmp_path, kind):
    run = run_of(data_of(kind, tmp_path / "data"), tmp_path / "run")
    before = set(threading.enumerate())
    read(run, 3)
    left = [t for t in threading.enumerate() if "grain" in t.name and t not in before]
    for thread in left:  # told to end, and not waited for
        thread.join(timeout=60)
    assert [thread for thread in left if thread.is_alive()] == []


def test_held_out_loss_per_byte_counts_the_bytes(tmp_path):
    bpe = write_bpe(tmp_path / "bpe")
    runs = {
        kind: run_of(data_of(kind, tmp_path / kind, tokenizer=str(bpe)), tmp_path / "run")
        for kind in KINDS
    }
    tokenizer = FileTokenizer(bpe)
    for kind, run in runs.items():
        data = load_data(run)
        assert data.unit == "nats/token"
        assert data.bytes_per_token > 1.2
        if kind in ("text", "tokens"):  # the same split: whole documents, so that all bytes count
            targets = np.concatenate([b["targets"][b["targets"] >= 0] for b in data.held_out])
            texts = tokenizer.library.decode(targets.tolist())
            assert data.bytes_per_token == pytest.approx(len(texts) / len(targets))
    assert load_data(run_of(data_of("text", tmp_path / "b"), tmp_path / "run")).unit == "nats/byte"


@pytest.mark.parametrize("kind", ["text", "parquet", "tokens"])
def test_a_run_looks_for_its_files_once(tmp_path, monkeypatch, kind):
    run = run_of(data_of(kind, tmp_path / "data"), tmp_path / "run").resolved()
    looks = []

    def recorded(pattern, *rest):
        looks.append(pattern)
        return files_of(pattern, *rest)

    files_of = files._files_of
    monkeypatch.setattr(files, "_files_of", recorded)
    Run(run)
    assert looks == list(run.data.files)


def test_what_does_not_fit_the_run_is_said_before_the_documents_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "read_documents", None)
    data = data_of("text", tmp_path / "data", tokenizer=str(write_bpe(tmp_path / "bpe")))
    with pytest.raises(RunError, match=r"model\.vocab_size: .* got 299"):
        Run(run_of(data, tmp_path / "run", vocab_size=299).resolved())


def check(run):
    check_tokenizer(run, find_source(run.data).tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_has_to_fit_the_model(tmp_path, kind):
    bpe = str(write_bpe(tmp_path / "bpe"))
    data = data_of(kind, tmp_path / "data", tokenizer=bpe)
    with pytest.raises(RunError, match=r"model\.vocab_size: .* tokenizer's 300, got 299"):
        check(run_of(data, tmp_path / "run", vocab_size=299))


def test_shards_bring_their_tokenizer(tmp_path):
    bpe = str(write_bpe(tmp_path / "bpe"))
    data = data_of("tokens", tmp_path / "data", tokenizer=bpe)
    assert data.tokenizer is None
    run = run_of(data, tmp_path / "run")
    assert load_data(run).tokenizer.fingerprint == FileTokenizer(tmp_path / "bpe").fingerprint
    other = dataclasses.replace(data, tokenizer="bytes")
    with pytest.raises(RunError, match=r"data\.tokenizer: expected that of .*00000.* 300 tokens"):
        load_data(run_of(other, tmp_path / "run"))
    (tmp_path / "data" / "shards" / "tokenizer.json").unlink()
    with pytest.raises(RunError, match=r"tokenizer: expected a tokenizer\.json.*shards"):
        load_data(run)


def test_a_run_is_resumed_with_its_own_tokenizer(tmp_path):
    bpe, directory = str(write_bpe(tmp_path / "bpe")), tmp_path / "run"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    data = data_of("text", tmp_path / "data")
    check(run_of(data, directory, resume=True))
    with_file = dataclasses.replace(data, tokenizer=bpe)
    with pytest.raises(RunError, match=r"data\.tokenizer: expected that of the run .*\(bytes\)"):
        check(run_of(with_file, directory, resume=True))
    FileTokenizer(tmp_path / "bpe").save(directory)
    check(run_of(with_file, directory, resume=True))
    with pytest.raises(RunError, match=r"data\.tokenizer: .*tokenizer\.json\), got bytes"):
        check(run_of(data, directory, resume=True))


def test_a_sample_needs_something_to_go_on_from(tmp_path):
    path = write_bpe(tmp_path / "bpe")
    values = json.loads((path / "vocab.json").read_text())
    values["<|start|>"] = values.pop("<|endoftext|>")
    (path / "vocab.json").write_text(json.dumps(values))
    data = data_of("text", tmp_path / "data", tokenizer=str(path))
    with pytest.raises(RunError, match=r"sample_prompt: expected text, .* got ''"):
        check(run_of(data, tmp_path / "run"))
    check(run_of(data, tmp_path / "run", sample_prompt="word"))
    check(run_of(data, tmp_path / "run", sample_tokens=0))
    opened = dataclasses.replace(data, start_token="<|start|>")
    check(run_of(opened, tmp_path / "run"))


def out(text):
    """A document is held out where this is below the fraction."""
    return place(digest_of(text.encode()))


@pytest.mark.parametrize("kind", ["text", "tokens", "stream"])
def test_held_out_documents_of_one_token_are_refused_before_training(tmp_path, kind):
    words = [f"w{i}" for i in range(59)]
    library = Tokenizer(WordLevel({word: i for i, word in enumerate(["?", *words])}, "?"))
    library.pre_tokenizer = Whitespace()
    library.save(str(tmp_path / "words.json"))
    fraction = min(map(out, words)) + 1e-9
    long = next(t for t in (" ".join(words[i:]) for i in range(20)) if out(t) > fraction)
    data = data_of(
        kind,
        tmp_path / "data",
        [*words, long],
        tokenizer=str(tmp_path / "words.json"),
        held_out_fraction=fraction,
    )
    run = run_of(data, tmp_path / "run", sample_tokens=0)
    with pytest.raises(RunError, match=r"data\.held_out_fraction: expected .*, got 1 of 1 togeth"):
        load_data(run)


def test_the_digest_is_that_of_the_documents(tmp_path):
    def digest(data):
        return load_data(run_of(data, tmp_path / "run")).fingerprint

    data = data_of("jsonl", tmp_path / "a")
    assert digest(data) == digest(data_of("text", tmp_path / "b"))
    assert digest(data) == digest(data_of("parquet", tmp_path / "c"))
    shards, stream = (data_of(kind, tmp_path / kind) for kind in ("tokens", "stream"))
    before = digest(shards), digest(stream)
    assert before == (digest(shards), digest(stream))
    expected = digest(data)
    texts = [text.replace("word1", "word2") for text in TEXTS]
    assert digest(data_of("jsonl", tmp_path / "a", texts)) != expected
    changed = (
        data_of("tokens", tmp_path / "changed", texts),
        data_of("stream", tmp_path / "stream", texts),
    )
    assert not {*map(digest, changed)} & {*before}


def test_the_vocabulary_follows_the_tokenizer_or_is_far_too_large(tmp_path, capsys):
    run = run_of(DataConfig(files=("a",)), tmp_path / "run", vocab_size=513)
    assert fit_vocabulary(run, ByteTokenizer()) == run
    assert capsys.readouterr().err == ""
    large = run_of(DataConfig(files=("a",)), tmp_path / "run", vocab_size=514)
    assert fit_vocabulary(large, ByteTokenizer()) == large
    warning = capsys.readouterr().err
    assert "warning: model.vocab_size: 514 for a tokenizer of 257 tokens" in warning
    assert warning.count("\n") == 1
    fitted = fit_vocabulary(dataclasses.replace(large, fit_vocab_size=True), ByteTokenizer())
    assert fitted.model.vocab_size == 257
    assert not fitted.fit_vocab_size


def test_what_is_odd_about_documents_is_said_in_one_line_each(tmp_path, capsys):
    write = (tmp_path / "a.txt", "x" * 40), (tmp_path / "b.txt", "y" * 40)
    for path, text in write:
        path.write_text(text)
    (tmp_path / "c.bin").write_bytes(b"\xff\xd8" * 20)
    (tmp_path / "d.jsonl").write_text('{"text": ""}\n{"text": "z"}\n{"text": ""}\n')
    load_data(run_of(DataConfig(files=(str(tmp_path),)), tmp_path / "run"))
    first, second = capsys.readouterr().err.splitlines()
    assert "data.field: 2 record(s) with nothing in 'text' to learn are left out" in first
    assert "d.jsonl" in first
    assert "data.files: 1 document(s) are not UTF-8 text" in second
