"""`python -m benchmarks training` with a tiny model: the step, its parts, and what is counted."""

import dataclasses
import json

import jax
import pytest

from benchmarks.costs import Cost
from benchmarks.part_costs import part_costs
from benchmarks.training import TrainingConfig, _parts_table, time_steps, training
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


def test_steps_that_count_begin_when_nothing_is_left_to_do(monkeypatch):
    """And each is dispatched before the one before it is waited for."""
    done = []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: done.append("wait"))

    def run(state, other):
        done.append("run")
        return state, other

    _, _, times = time_steps(run, 0, 0, steps=3, warm_up=2)
    assert done == ["run", "run", "wait", "wait", "run", "run", "wait", "run", "wait", "wait"]
    assert len(times) == 3


def test_floors_of_the_parts():
    """Of a product, of bytes, and of what only a hybrid has, which has none."""
    costs = part_costs(MODEL, 1000, rows=4, length=32, dtype="bfloat16", accumulation=2)
    entries = 3 * 16 * MODEL.mlp_width
    assert costs["MLP"].flops == 2 * 2 * 3 * (2 * 128 * entries)  # micro-batches, layers, passes
    # q, k, v, gate and output of the one layer that has a state; keys of 16, values of 32
    assert costs["projections"].flops == 2 * 3 * (2 * 128 * 16 * (2 * 16 + 3 * 32))
    assert costs["convolutions"] == Cost(0, 2 * 5 * 128 * (2 * 16 + 32) * 2)
    assert costs["optimizer"].bytes == 28_000
    assert "attention" not in costs
    floors = {"MLP": 2e-3, "norms": 1e-3}
    table = _parts_table({"MLP": 4e-3, "norms": 1e-3, "attention": 1e-3}, 1e-2, floors)
    rows = {line.split("|")[1].strip(): line.split("|")[4:6] for line in table.splitlines()}
    assert [cell.strip() for cell in rows["MLP"]] == ["2.00", "2.00"]
    assert [cell.strip() for cell in rows["attention"]] == ["-", "-"]
    assert [cell.strip() for cell in rows["sum of the parts"]] == ["-", "-"]


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
