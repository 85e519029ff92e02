"""Whole runs of a tiny model: what they leave behind, and what interruptions cost."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import threading

import jax
import numpy as np
import pytest

from mdn_jax import MDNConfig
from mdn_jax.cli.evaluate import main as evaluate
from mdn_jax.cli.generate import main as generate
from mdn_jax.errors import RunError
from mdn_jax.saved.digest import file_digest
from mdn_jax.saved.model import find_checkpoint
from tests.text.helpers import write_bpe
from tests.tiny import TINY_MODEL
from tests.train.data.helpers import data_of
from tests.train.helpers import assert_identical, tiny_config
from train.config import from_dict
from train.config_sections import OptimizerConfig
from train.data.packing import PackedRows
from train.loop import train
from train.metrics.log import read_metrics
from train.run import Run


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    """A run from start to end, and its result."""
    config = tiny_config(corpus, tmp_path_factory.mktemp("straight") / "run")
    return config, train(config)


def test_what_a_run_leaves_behind(straight):
    config, result = straight
    directory = config.directory
    assert from_dict(json.loads((directory / "config.json").read_text())) == config.resolved()
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {"3", "6"}
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (directory / "sample.txt").exists()
    records = read_metrics(directory / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "held_out_loss" in r] == [3, 6]
    assert records[-1]["held_out_loss"] == result.held_out_loss
    assert {"loss", "grad_norm", "learning_rate", "skipped", "tokens_per_second"} < records[
        0
    ].keys()
    assert all(0 <= r["data_wait"] <= 1 for r in records if "loss" in r)
    assert result.signal is None
    assert int(result.state.step) == 6


def test_losses_are_those_of_the_held_out_bytes(straight):
    config, result = straight
    trainer = Run(config)
    assert result.unigram_entropy == trainer.unigram
    assert trainer.evaluate(result.state.params).mean == result.held_out_loss


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_resuming_is_identical_to_never_stopping(straight, corpus, tmp_path, accumulation):
    whole, expected = straight
    if accumulation > 1:
        whole = tiny_config(corpus, tmp_path / "whole", accumulation=accumulation)
        expected = train(whole)
    halved = dataclasses.replace(whole, output_dir=str(tmp_path / "halved"), resume=True)
    shutil.copytree(whole.directory, halved.directory)
    shutil.rmtree(halved.directory / "checkpoints" / "6")
    actual = train(halved)
    assert_identical(actual.state, expected.state)
    assert actual.held_out_loss == expected.held_out_loss
    losses = [
        [(r["step"], r["loss"]) for r in read_metrics(c.directory / "metrics.jsonl") if "loss" in r]
        for c in (whole, halved)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokens", "stream"])
def test_resuming_shards_and_streams_is_identical_to_never_stopping(tmp_path, kind, capsys):
    name = str(write_bpe(tmp_path / "bpe"))
    config = dataclasses.replace(
        tiny_config(tmp_path, tmp_path / "whole", sample_prompt="word"),
        data=data_of(kind, tmp_path / "data", tokenizer=name),
        model=MDNConfig(**TINY_MODEL | {"vocab_size": 300}),
    )
    expected = train(config)
    halved = dataclasses.replace(config, output_dir=str(tmp_path / "halved"), resume=True)
    shutil.copytree(config.directory, halved.directory)
    shutil.rmtree(halved.directory / "checkpoints" / "6")
    tokenizer = halved.directory / "tokenizer.json"
    text = tokenizer.read_text()
    assert find_checkpoint(halved.directory).tokenizer == file_digest(tokenizer)
    tokenizer.write_text(f"{text} ")  # not as it was: it comes again
    actual = train(halved)
    assert tokenizer.read_text() == text
    assert_identical(actual.state, expected.state)
    assert actual.held_out_loss == expected.held_out_loss
    assert actual.unit == "nats/token"
    last = read_metrics(halved.directory / "metrics.jsonl")[-1]
    assert last["held_out_nats_per_byte"] == actual.held_out_loss / actual.bytes_per_token
    if kind == "stream":
        return
    # what the run leaves is enough to use its model
    capsys.readouterr()
    assert generate([str(halved.directory), "--prompt", "word", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("word")
    (tmp_path / "a.txt").write_text("word1 word2 word3")
    files = ["--files", str(tmp_path / "a.txt"), "--json"]
    assert evaluate(["perplexity", str(halved.directory), *files]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 17


def test_resuming_a_finished_run_changes_nothing(straight, tmp_path, capsys):
    config, expected = straight
    again = dataclasses.replace(config, output_dir=str(tmp_path / "again"), resume=True)
    shutil.copytree(config.directory, again.directory)
    before = (again.directory / "metrics.jsonl").read_text()
    actual = train(again)
    assert_identical(actual.state, expected.state)
    assert actual.held_out_loss == expected.held_out_loss
    assert (again.directory / "metrics.jsonl").read_text() == before
    assert "no steps left" in capsys.readouterr().out


def test_more_steps_go_on_at_the_final_learning_rate(straight, tmp_path):
    config, _ = straight
    longer = dataclasses.replace(config, output_dir=str(tmp_path / "longer"), resume=True, steps=8)
    shutil.copytree(config.directory, longer.directory)
    assert int(train(longer).state.step) == 8
    last = [r for r in read_metrics(longer.directory / "metrics.jsonl") if "loss" in r][-1]
    assert last["learning_rate"] == pytest.approx(1e-3)


def test_a_directory_with_a_run_is_left_alone(straight):
    config, _ = straight
    files = {p: p.stat().st_mtime_ns for p in config.directory.rglob("*")}
    with pytest.raises(RunError, match=r"output_dir: expected a directory without a run.*--resume"):
        train(config)
    assert {p: p.stat().st_mtime_ns for p in config.directory.rglob("*")} == files


def test_a_checkpoint_of_another_configuration_is_refused(straight):
    config, _ = straight
    model = MDNConfig(**TINY_MODEL | {"hidden_size": 24})
    other = dataclasses.replace(
        config, resume=True, model=model, optimizer=OptimizerConfig(warmup_steps=2)
    )
    with pytest.raises(RunError) as error:
        train(other)
    message = str(error.value)
    assert "resume: expected the configuration of the checkpoint of step 6" in message
    assert "model.hidden_size: the checkpoint has 16, this run 24" in message
    assert "optimizer.learning_rate: the checkpoint has 0.01, this run 0.0003" in message
    assert "seed" not in message


def test_a_checkpoint_of_other_documents_is_refused(straight, tmp_path):
    config, _ = straight
    (tmp_path / "a.txt").write_text("something else\n" * 20)
    data = dataclasses.replace(config.data, files=(str(tmp_path / "a.txt"),))
    with pytest.raises(RunError, match=r"data\.files: expected the documents of the checkpoint"):
        train(dataclasses.replace(config, resume=True, data=data))


def test_documents_may_move_between_start_and_resume(straight, corpus, tmp_path):
    config, expected = straight
    shutil.copytree(corpus, tmp_path / "corpus")
    shutil.copytree(config.directory, tmp_path / "run")
    data = dataclasses.replace(config.data, files=(str(tmp_path / "corpus" / "*"),))
    moved = dataclasses.replace(config, resume=True, data=data, output_dir=str(tmp_path / "run"))
    assert train(moved).held_out_loss == expected.held_out_loss


def test_resume_without_a_checkpoint_is_refused(corpus, tmp_path):
    config = tiny_config(corpus, tmp_path / "nothing", resume=True)
    with pytest.raises(RunError, match=r"resume: expected a checkpoint in .*found none"):
        train(config)
    assert not config.directory.exists()


def test_an_output_directory_that_cannot_be_made_is_named(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"output_dir: expected a directory .*file/run: Not a dir"):
        train(tiny_config(corpus, tmp_path / "file" / "run"))


def test_a_failed_run_loses_no_checkpoint(corpus, tmp_path, monkeypatch, straight):
    _, expected = straight
    config = tiny_config(corpus, tmp_path / "run")
    batch = PackedRows.batch

    def failing(self, step, rows):
        if step == 4:
            raise OSError("disk gone")
        return batch(self, step, rows)

    monkeypatch.setattr(PackedRows, "batch", failing)
    with pytest.raises(OSError, match="disk gone"):
        train(config)
    monkeypatch.undo()
    assert [p.name for p in (config.directory / "checkpoints").iterdir()] == ["3"]
    resumed = train(dataclasses.replace(config, resume=True))
    assert_identical(resumed.state, expected.state)


@pytest.mark.parametrize(
    ("step", "advice"),
    [
        pytest.param(3, "there is no checkpoint yet: start again", marks=pytest.mark.slow),
        (6, "the checkpoint of step 3 is as it was: continue with --resume"),
    ],
)
def test_a_save_that_fails_ends_the_run(corpus, tmp_path, monkeypatch, step, advice):
    config = tiny_config(corpus, tmp_path / "run", eval_every=9)
    mkdir = os.mkdir

    def failing(path, *arguments, **options):
        if f"checkpoints/{step}." in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", failing)
    words = rf"checkpoint: expected to write to {config.directory}.*Read-only.*; .*{advice}$"
    with pytest.raises(RunError, match=words):
        train(config)
    # none is left that would keep the process: Grain's were told to end, asyncio's end with it
    left = [t for t in threading.enumerate() if not t.daemon and "asyncio" not in t.name]
    for thread in set(left) - {threading.main_thread()}:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not (config.directory / "run.lock").exists()


@pytest.mark.parametrize("content", [b"", b"{}"])
def test_a_damaged_configuration_is_named_on_resume(straight, tmp_path, content):
    config, _ = straight
    again = dataclasses.replace(config, output_dir=str(tmp_path / "again"), resume=True)
    shutil.copytree(config.directory, again.directory)
    (again.directory / "config.json").write_bytes(content)
    with pytest.raises(RunError, match=rf"^config.json: expected .* in {again.directory}"):
        train(again)


def test_a_run_is_told_to_stop(corpus, tmp_path, straight):
    _, expected = straight
    config = tiny_config(corpus, tmp_path / "run")
    answers = iter([False, True])
    result = train(config, stop=lambda: next(answers))
    assert (result.signal, result.held_out_loss) == (signal.SIGTERM, None)
    assert [p.name for p in (config.directory / "checkpoints").iterdir()] == ["2"]
    resumed = train(dataclasses.replace(config, resume=True))
    assert_identical(resumed.state, expected.state)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_stops(corpus, tmp_path, monkeypatch, straight, number):
    _, expected = straight
    config = tiny_config(corpus, tmp_path / "run")
    place, placed = Run.place, []

    def interrupted(self, batch):
        placed.append(batch)
        if len(placed) == 2:
            os.kill(os.getpid(), number)
        return place(self, batch)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(Run, "place", interrupted)
    result = train(config)
    monkeypatch.undo()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert result.signal == number
    assert result.held_out_loss is None
    assert [p.name for p in (config.directory / "checkpoints").iterdir()] == ["2"]
    assert not (config.directory / "loss.png").exists()
    resumed = train(dataclasses.replace(config, resume=True))
    assert_identical(resumed.state, expected.state)


def test_only_the_latest_checkpoints_are_kept(corpus, tmp_path):
    config = tiny_config(corpus, tmp_path / "run", checkpoint_every=1, keep_checkpoints=2)
    train(config)
    assert {p.name for p in (config.directory / "checkpoints").iterdir()} == {"5", "6"}


@pytest.mark.slow
def test_skipped_steps_are_counted_and_survive_a_resume(corpus, tmp_path):
    # a learning rate that no gradient survives: every step after the first update is skipped
    optimizer = OptimizerConfig(learning_rate=1e38, warmup_steps=0, weight_decay=0.0)
    config = tiny_config(corpus, tmp_path / "run", optimizer=optimizer, steps=4, eval_every=9)
    train(config)
    shutil.rmtree(config.directory / "checkpoints" / "4")
    result = train(dataclasses.replace(config, resume=True))
    assert int(result.state.skipped) == 3
    records = read_metrics(config.directory / "metrics.jsonl")
    assert [r["skipped"] for r in records if "skipped" in r] == [0, 1, 2, 3]
    assert [r["grad_norm"] is None for r in records if "skipped" in r] == [False, True, True, True]
    for x in jax.tree.leaves(result.state.params):
        assert np.isfinite(x).all()


@pytest.mark.slow
def test_bfloat16_computes_with_float32_parameters(corpus, tmp_path):
    result = train(tiny_config(corpus, tmp_path / "run", dtype="bfloat16", sample_tokens=0))
    assert {x.dtype.name for x in jax.tree.leaves(result.state.params)} == {"float32"}
    assert np.isfinite(result.held_out_loss)
