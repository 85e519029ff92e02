"""`python -m train tokenize`, whole, interrupted and with bad input."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mdn_jax.text.files import find_files
from mdn_jax.text.tokenizer import FileTokenizer
from tests.text.helpers import TEXTS, write_bpe, write_jsonl, write_parquet
from train.cli.tokenize import main
from train.config_sections import DataConfig
from train.data.shards import open_shards, read_header


def arguments(directory, *files, shard=800, **flags):
    flags = {"processes": 1, "shard-mb": shard / 1e6} | flags
    named = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [str(directory), "--files", *map(str, files), *named]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_every_kind_of_file_gives_the_same_documents(tmp_path, capsys):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i:03}.txt").write_text(text)
    bpe = write_bpe(tmp_path / "bpe")
    sources = {
        "text": str(tmp_path / "*.txt"),
        "jsonl": write_jsonl(tmp_path / "a.jsonl"),
        "parquet": write_parquet(tmp_path / "hf" / "data" / "train-0.parquet").parents[1],
    }
    read = {}
    for name, files in sources.items():
        assert main(arguments(tmp_path / name, files, tokenizer=bpe)) == 0
        assert "60 documents" in capsys.readouterr().out
        paths = [p for p, _ in find_files(DataConfig(files=(str(tmp_path / name),)))]
        tokenizer = FileTokenizer(tmp_path / name)  # the one beside them
        train, held_out, _ = open_shards(paths, tokenizer, held_out_fraction=0.1, verify=True)
        read[name] = [
            documents.read(i, 0, int(documents.length[i])).tolist()
            for documents in (train, held_out)
            for i in range(len(documents))
        ]
        assert sorted(tokenizer.library.decode(tokens) for tokens in read[name]) == sorted(TEXTS)
    assert read["text"] == read["jsonl"] == read["parquet"]


@pytest.mark.slow
def test_processes_change_nothing(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS * 5)
    assert main(arguments(tmp_path / "one", path)) == 0
    assert main(arguments(tmp_path / "two", path, processes=2)) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) > 5


def test_the_same_command_goes_on(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl")
    output = tmp_path / "out"
    assert main(arguments(output, path)) == 0
    whole = contents(output)
    assert len(whole) > 2
    names = sorted(whole)
    (output / names[1]).rename(output / f"{names[1][:-7]}.77.tmp")  # as an interruption leaves it
    times = {name: (output / name).stat().st_mtime_ns for name in names if name != names[1]}
    capsys.readouterr()
    assert main(arguments(output, path)) == 0
    assert f"in {len(names)} shards ({len(names) - 1} of them there before)" in (
        capsys.readouterr().out
    )
    assert contents(output) == whole
    assert {name: (output / name).stat().st_mtime_ns for name in times} == times


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_command_goes_on(tmp_path, capsys, kind):
    path = write_jsonl(tmp_path / "a.jsonl", [text * 40 for text in TEXTS] * 48)
    output, whole = tmp_path / "out", tmp_path / "whole"
    bpe = write_bpe(tmp_path / "bpe")
    flags = {"tokenizer": bpe, "shard": 100_000}
    command = [sys.executable, "-m", "train", "tokenize"]
    command += arguments(output, path, **flags | {"processes": 2})
    # a shell that starts the tests in the background has them, and what they start, ignore SIGINT
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    while not list(output.glob("*.tokens")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(kind)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (-9 if kind == signal.SIGKILL else 130), error
    assert "Traceback" not in error
    finished = {p.name: p.read_bytes() for p in output.glob("*.tokens")}
    assert main(arguments(whole, path, **flags)) == 0
    assert main(arguments(output, path, **flags)) == 0
    assert 0 < len(finished) < len(list(output.glob("*.tokens")))
    assert finished.items() <= contents(output).items()
    assert contents(output) == contents(whole)


def test_a_directory_of_another_command_is_left_alone(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl")
    output = tmp_path / "out"
    assert main(arguments(output, path)) == 0
    before = contents(output)
    other = write_jsonl(tmp_path / "b.jsonl", TEXTS[:50])
    for changed in (
        arguments(output, path, shard=1600),
        arguments(output, path, field="id"),
        arguments(output, path, tokenizer=write_bpe(tmp_path / "bpe")),
        arguments(output, other, shard=660),
    ):
        assert main(changed) == 1
        message = capsys.readouterr().err
        assert message.startswith(
            "python -m train tokenize: error: output: expected a new directory, or one"
        )
    path.write_text(path.read_text().replace("word1", "word2"))  # the input changed
    os.utime(path, ns=(0, 0))
    assert main(arguments(output, path)) == 1
    assert contents(output) == before


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_corrupt_record_is_named_and_leaves_what_is_done(tmp_path, capsys, processes):
    path = write_jsonl(tmp_path / "a.jsonl")
    lines = path.read_text().splitlines()
    lines[40] = "{"
    path.write_text("\n".join(lines))
    output = tmp_path / "out"
    assert main(arguments(output, path, processes=processes)) == 1
    message = capsys.readouterr().err
    assert f"python -m train tokenize: error: {path}:41: expected a line of JSON" in message
    assert "Traceback" not in message
    done = sorted(output.glob("*.tokens"))
    assert all(read_header(shard) for shard in done)
    assert processes == 2 or len(done) >= 1


@pytest.mark.parametrize(
    ("flags", "text", "status", "expected"),
    [
        ({}, "", 1, "data.files: expected files with text in them, got 1 without"),
        ({"field": "body"}, '{"text": "a"}', 1, "data.field: expected one of ['text']"),
        ({"tokenizer": "nowhere"}, '{"text": "a"}', 1, "tokenizer: expected a tokenizer.json"),
        ({"processes": 0}, '{"text": "a"}', 2, "processes: expected a number > 0, got 0"),
        ({"shard-mb": -1}, '{"text": "a"}', 2, "shard_mb: expected a number > 0, got -1"),
    ],
)
def test_bad_input_is_one_clear_message(tmp_path, capsys, flags, text, status, expected):
    (tmp_path / "a.jsonl").write_text(text)
    command = arguments(tmp_path / "out", tmp_path / "a.jsonl", **flags)
    if status == 2:
        with pytest.raises(SystemExit, match="2"):
            main(command)
    else:
        assert main(command) == status
    assert expected in capsys.readouterr().err


def test_shards_are_not_tokenised_again(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl")
    assert main(arguments(tmp_path / "out", path)) == 0
    assert main(arguments(tmp_path / "again", tmp_path / "out")) == 1
    assert "expected text, JSONL or Parquet, got shards" in capsys.readouterr().err


def test_a_header_says_what_is_inside(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    assert main(arguments(tmp_path / "out", path, shard=1e9)) == 0
    (shard,) = (tmp_path / "out").iterdir()
    data = shard.read_bytes()
    header = json.loads(data[8:4096])
    assert header["documents"] == len(TEXTS)
    assert header["tokens"] == sum(len(text) + 1 for text in TEXTS)
    tokens = np.frombuffer(data, "<u2", count=header["tokens"], offset=4096)
    assert bytes(tokens[1 : 1 + len(TEXTS[0])].tolist()).decode() == TEXTS[0]
