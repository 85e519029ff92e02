"""`python -m benchmarks generation` with a tiny model: memory and time early and late."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from benchmarks import generation as command
from benchmarks.generation import GenerationConfig
from configs import CONFIGS
from mdn_jax import MDNConfig
from train.config import TrainConfig

MODEL = MDNConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_heads=1, head_dim=16)


def test_memory_does_not_grow_with_the_position(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CONFIGS, "tiny", lambda: TrainConfig(model=MODEL))
    output = tmp_path / "generation.json"
    config = GenerationConfig(
        model="tiny",
        batch_sizes=(1, 2),
        positions=(44, 300),  # the rest of the longer one is as long as the other
        tokens=8,
        block=2,
        piece=64,
        output=output,
    )
    command.generation(config)
    table = capsys.readouterr().out
    assert "ms a token" in table
    assert table.endswith("no GPU launches any, or its trace has none that could be counted\n")
    rows = json.loads(output.read_text())["results"]
    assert [(row["batch_size"], row["position"]) for row in rows] == [
        (1, 44),
        (1, 300),
        (2, 44),
        (2, 300),
    ]
    # both states in float32 and three tails of the convolutions in bfloat16
    assert rows[0]["state"] == 2 * 4 * 16 * 32 + 4 * 2 * (16 + 16 + 32)
    assert rows[0]["state"] == rows[1]["state"]
    assert rows[2]["state"] == 2 * rows[0]["state"]
    assert rows[1]["memory"] <= 1.02 * rows[0]["memory"]
    assert all(row["step"] > 0 for row in rows)
    assert rows[0]["prefill"] is None
    assert rows[1]["prefill"] > 0


def test_the_most_bytes_in_use_are_seen():
    with command._most_bytes_in_use() as seen:
        wide = jnp.zeros((1 << 20,), jnp.float32)
        enough = len(seen) + 2  # compiling may have taken any number of samples
        while len(seen) < enough:
            wide.block_until_ready()
    assert max(seen) - seen[0] >= 0.9 * wide.nbytes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "large"}, "model: expected one of smoke, .*, got 'large'"),
        ({"tokens": 100}, "tokens: expected at least two blocks"),
    ],
)
def test_bad_options(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(GenerationConfig(), **change)
