"""Runs on two simulated devices that share the tokens of rows; prints what they measured as JSON.

python -m tests.train.parallel.context_runs CORPUS OUTPUT
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2"
    )

import jax

from mdn_jax import MDNConfig
from mdn_jax.models.attention_config import AttentionConfig
from tests.tiny import TINY_MODEL
from tests.train.helpers import tiny_config
from tests.train.parallel.processes import compile_once
from train.cli.train import main as command
from train.config import to_dict
from train.config_sections import GuardConfig, OptimizerConfig
from train.loop import train
from train.metrics.log import read_metrics

# two layers of a stack, keys that are gathered, another rule
HYBRID = {"num_hidden_layers": 4, "num_heads": 2, "mixer": "gdn", "other_mixer": "mdn"}
HYBRID |= {"other_layers": (0, 1), "attn": AttentionConfig(layers=(2,), num_heads=2)}
HYBRID |= {"intermediate_size": 0}
CONTEXT = ["--mesh.data", "1", "--mesh.context", "2"]


def configuration(corpus: Path, output: Path):
    """All that a step may have besides."""
    muon = OptimizerConfig(name="muon", learning_rate=1e-2, warmup_steps=1, ema_decay=0.5)
    config = tiny_config(
        corpus,
        output,
        optimizer=muon,
        guard=GuardConfig(action="skip"),
        **{"accumulation": 2, "remat": "states", "stability_every": 3, "sample_tokens": 2},
    )
    return dataclasses.replace(config, model=MDNConfig(**TINY_MODEL | HYBRID))


def measured(output: Path) -> dict:
    """Losses of the steps, and what was measured beside them, the last of each."""
    records = read_metrics(output / "metrics.jsonl")
    names = ("held_out", "layers.")
    others = {name: x for record in records for name, x in record.items()}
    return {
        "losses": [record["loss"] for record in records if "loss" in record],
        "others": {name: x for name, x in others.items() if name.startswith(names)},
    }


def main(corpus: str, output: str) -> None:
    compile_once(f"{output}/compiled")
    where = Path(output)
    config = configuration(Path(corpus), where / "one")
    train(dataclasses.replace(config, sample_tokens=0), devices=jax.devices()[:1])
    file = where / "hybrid.json"
    file.write_text(json.dumps(to_dict(config)))
    two = [str(file), *CONTEXT, "--output-dir", str(where / "two")]
    assert command(two) == 0
    assert (where / "two" / "sample.txt").exists()
    tuned = [str(file), *CONTEXT, "--output-dir", str(where / "tuned")]
    assert command([*tuned, "--init-from", str(where / "two")]) == 0
    print(json.dumps({name: measured(where / name) for name in ("one", "two", "tuned")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
