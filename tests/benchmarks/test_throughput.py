"""`python -m benchmarks throughput`: a small run, the table, models that do not fit."""

import dataclasses
import json

import jax
import pytest

from benchmarks import throughput as command
from benchmarks.throughput import Row, ThroughputConfig, table, throughput
from tests.compile_cache import no_folder


@pytest.mark.slow
def test_smoke(tmp_path, capsys, monkeypatch):
    config = ThroughputConfig(models=("mamba2_400m",), output=tmp_path, smoke=True)
    throughput(config)
    records = [json.loads(x) for x in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["model"], r["length"], r["rows"]) for r in records] == [
        ("mamba2_400m", 16, 2),
    ]
    assert all(len(r["seconds"]) == 2 and min(r["seconds"]) > 0 for r in records)
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "throughput.png").read_bytes()[:4] == b"\x89PNG"

    def not_again(*_):
        raise AssertionError

    monkeypatch.setattr(command, "_run", not_again)
    throughput(config)
    with pytest.raises(AssertionError):
        throughput(dataclasses.replace(config, remat="none"))


@pytest.mark.slow
def test_compile_only(tmp_path, capsys):
    options = {"models": ("mamba2_400m",), "output": tmp_path, "smoke": True}
    with no_folder():
        throughput(ThroughputConfig(**options, compile_only=True))
    assert "mamba2_400m, 16: compiled in" in capsys.readouterr().out
    assert (tmp_path / "results.jsonl").read_text() == ""
    assert any((tmp_path / "compiled").iterdir())


def test_every_model_has_a_small_one():
    for name in ThroughputConfig().models:
        small = command._model(ThroughputConfig(smoke=True), name)
        assert small.mixer == command._model(ThroughputConfig(), name).mixer
        assert (small.hidden_size, small.mlp_width == 0) == (16, name.startswith("mamba2"))


def test_a_model_that_does_not_fit(monkeypatch):
    def fails(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr("train.model_and_step.make_train_step", fails)
    config = ThroughputConfig(smoke=True, tokens=32, lengths=(16,))
    row, state = command._run(config, "mdn_400m", 16)
    assert row.seconds == []
    assert state is None


def test_table():
    rows = [
        Row("a", 2048, 16, [0.5, 0.25, 1.0], 1.0, None),
        Row("a", 4096, 8, [], 1.0, None),
        Row("b", 4096, 8, [2.0], 1.0, None),
    ]
    lines = table(rows, 32768).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["tokens/s", "2,048", "4,096"]
    assert cells[2:] == [["a", "65,536", "out of memory"], ["b", "-", "16,384"]]


def test_bad_configurations():
    with pytest.raises(ValueError, match=r"models: expected some of .*, got 'gpt'"):
        ThroughputConfig(models=("gpt",))
    with pytest.raises(ValueError, match=r"lengths: expected divisors of tokens = 32768.*got 3000"):
        ThroughputConfig(lengths=(3000,))
    with pytest.raises(ValueError, match="repeats: expected an int >= 1, got 0"):
        ThroughputConfig(repeats=0)
