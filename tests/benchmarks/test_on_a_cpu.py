"""What the benchmarks do on a CPU with no sizes named: small ones, or one line that refuses."""

import jax
import pytest

from benchmarks import generation, throughput, training
from benchmarks.command import main
from benchmarks.timing import model_for_device


def test_sizes_follow_the_device(monkeypatch):
    assert model_for_device() == "smoke"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert model_for_device() == "mdn_400m"


def test_the_step_of_a_small_model(monkeypatch):
    assert training._Run(training.TrainingConfig()).base.name == "smoke"


def test_generation_of_one_row(monkeypatch, capsys):
    asked = []
    row = generation.Row("layers", 1, 1_000, None, 1.0, 1, 1, None)
    monkeypatch.setattr(generation, "_run", lambda c, m, *what: asked.append(what) or row)
    generation.generation(generation.GenerationConfig())
    assert asked == [("layers", 1, 1_000)]
    assert ", smoke: " in capsys.readouterr().out


def test_decoding_by_xla(capsys):
    main(["decode", "--runs", "2", "--loop", "2"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "1,2,64,64" in line]
    assert any(" xla " in line for line in lines)
    assert not any("triton" in line for line in lines)


def test_models_of_a_gpu_are_refused():
    with pytest.raises(SystemExit, match="smoke: expected --smoke on a CPU"):
        throughput.throughput(throughput.ThroughputConfig())
