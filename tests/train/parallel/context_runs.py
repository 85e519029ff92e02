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
from mdn_jax.ops import TRITON_CALL
from pallas_kernels.target import target_gpu
from tests.tiny import TINY_MODEL
from tests.train.helpers import tiny_config
from tests.train.sharing import shared_steps
from train.cli.train import main as command
from train.config import to_dict
from train.config_sections import GuardConfig, MeshConfig, OptimizerConfig
from train.loop import train
from train.metrics.log import read_metrics
from train.model_and_step import ModelAndStep

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


def lowered_for_gpus(config) -> str:
    """The step with the kernels, as it would go to XLA on two H100s."""
    sizes = {"num_heads": 1, "head_dim": 64, "expand_v": 1.0}
    model = MDNConfig(**TINY_MODEL | sizes)
    config = dataclasses.replace(config, model=model, implementation=None, sequence_length=256)
    made = ModelAndStep(dataclasses.replace(config, mesh=MeshConfig(data=1, context=2)).resolved())
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.sequence_length), "int32")
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made.like)
    with target_gpu((9, 0), dict(made.mesh.shape)):
        step = jax.jit(made.step.__wrapped__)
        traced = step.trace(state, dict.fromkeys(("tokens", "segment_ids", "targets"), tokens))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@shared_steps()
def main(corpus: str, output: str) -> None:
    where = Path(output)
    config = configuration(Path(corpus), where / "one")
    train(dataclasses.replace(config, sample_tokens=0), devices=jax.devices()[:1])
    file = where / "hybrid.json"
    file.write_text(json.dumps(to_dict(config)))
    two = [str(file), *CONTEXT, "--output-dir", str(where / "two")]
    assert command(two) == 0
    assert (where / "two" / "sample.txt").exists()
    tuned = [str(file), *CONTEXT, "--output-dir", str(where / "tuned")]
    tuned += ["--stability-every", "0", "--sample-tokens", "0"]  # as of `two`
    assert command([*tuned, "--init-from", str(where / "two")]) == 0
    report = {name: measured(where / name) for name in ("one", "two", "tuned")}
    text = lowered_for_gpus(config)
    counted = TRITON_CALL, "stablehlo.all_gather", "stablehlo.collective_permute"
    print(json.dumps(report | {"lowered": {name: text.count(name) for name in counted}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
