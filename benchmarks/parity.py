"""Trains a small model with two implementations of the rule and compares the loss curves."""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from mdn_jax import MDNConfig
from mdn_jax.ops.api import Implementation
from train.config import OptimizerConfig, TrainConfig
from train.loop import METRICS_FILE, train
from train.metrics import read_metrics
from train.tokenizer import VOCAB_SIZE


@dataclass(frozen=True)
class ParityConfig:
    """Compares two implementations over a short training run: same seed, same data."""

    implementations: tuple[Implementation, Implementation] = ("xla", "pallas_triton")
    """The two to compare."""
    steps: int = 200
    """Optimizer steps."""
    dtype: str = "bfloat16"
    """float32 or bfloat16."""
    tolerance: float = 0.01
    """Largest relative difference of the losses of any step."""


def parity(config: Annotated[ParityConfig, tyro.conf.arg(name="")]) -> None:
    """Prints the largest relative difference of the two loss curves; fails above the tolerance."""
    curves = []
    for implementation in config.implementations:
        with tempfile.TemporaryDirectory() as directory:
            train(_run(config, implementation, directory))
            records = read_metrics(Path(directory) / METRICS_FILE)
        curves.append(np.array([r["loss"] for r in records if "loss" in r], float))
    first, second = curves
    difference = float(np.max(np.abs(first - second) / first))
    print(
        f"{config.implementations[0]} {first[0]:.4f} -> {first[-1]:.4f}, "
        f"{config.implementations[1]} {second[0]:.4f} -> {second[-1]:.4f}; largest relative "
        f"difference of {len(first)} steps {difference:.2e} ({config.dtype})"
    )
    if not difference <= config.tolerance:
        raise SystemExit(f"above the tolerance of {config.tolerance}")


def _run(config: ParityConfig, implementation: Implementation, directory: str) -> TrainConfig:
    base = TrainConfig(
        name=f"parity-{implementation}",
        output_dir=directory,
        model=MDNConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            num_hidden_layers=4,
            num_heads=2,
            head_dim=64,
        ),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=min(20, config.steps // 2)),
        steps=config.steps,
        batch_size=16,
        sequence_length=512,
        implementation=implementation,
        log_every=1,
        eval_every=config.steps,
        eval_rows=16,
        checkpoint_every=config.steps,
        sample_tokens=0,
    )
    return dataclasses.replace(base, dtype=config.dtype)  # type: ignore[arg-type]
