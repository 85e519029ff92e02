"""`python -m benchmarks training` with a tiny model: the step, its parts, and what is counted."""

import dataclasses
import json

import pytest

from benchmarks.training import TrainingConfig, training
from configs import CONFIGS
from mdn_jax import MDNConfig
from mdn_jax.models import AttentionConfig
from train.config import TrainConfig

MODEL = MDNConfig(
    vocab_size=300,
    hidden_size=16,
    num_hidden_layers=2,
    num_heads=1,
    head_dim=16,
    attn=AttentionConfig(layers=(1,), num_heads=2),
)


@pytest.mark.slow
def test_step_and_parts(tmp_path, monkeypatch, capsys):
    run = TrainConfig(model=MODEL, batch_size=4, accumulation=2, sequence_length=32)
    monkeypatch.setitem(CONFIGS, "tiny", lambda: run)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    output = tmp_path / "training.json"
    training(
        TrainingConfig(
            model="tiny",
            accumulation=2,
            steps=2,
            implementation="scan",
            output=output,
            trace=tmp_path / "trace",
        )
    )
    table = capsys.readouterr().out
    assert "tokens/s" in table
    assert "sum of the parts" in table
    report = json.loads(output.read_text())
    whole, parts = report["whole"], report["parts"]
    assert whole["tokens"] == 4 * 32
    assert report["tokens_per_second"] == pytest.approx(4 * 32 / whole["seconds"])
    assert 0 < whole["trace"] + whole["compile"] < whole["first"] < whole["process"]
    assert set(parts) == {
        *("MLP", "norms", "projections", "gates", "convolutions", "kernel", "attention"),
        *("embeddings", "loss", "optimizer"),
    }
    assert all(seconds > 0 for seconds in parts.values())
    assert any((tmp_path / "trace").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "large"}, "model: expected one of smoke, .*, got 'large'"),
        ({"rows": 0}, "rows: expected an int >= 1, got 0"),
        ({"steps": 1}, "steps: expected an int >= 2, got 1"),
    ],
)
def test_bad_options(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TrainingConfig(), **change)
