"""Trains a small model with several implementations of the rule and compares the loss curves."""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from mdn_jax import MDNConfig
from mdn_jax.ops.api import Implementation
from mdn_jax.text.tokenizer import VOCAB_SIZE
from train.config import TrainConfig
from train.config_sections import OptimizerConfig


@dataclass(frozen=True)
class ParityConfig:
    """Compares implementations over a short training run: same seed, same data.

    With more than two, how far one drifts from the first says what rounding alone does: two right
    implementations drift apart as far.
    """

    implementations: tuple[Implementation, ...] = ("xla", "pallas_triton")
    """Two or more; each is compared with the first."""
    steps: int = 200
    """Optimizer steps."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of activations."""
    learning_rate: float = 5e-4
    """Peak learning rate; a high one amplifies rounding."""
    tolerance: float = 0.01
    """Largest relative difference of the losses of any step, for every pair."""


def parity(config: Annotated[ParityConfig, tyro.conf.arg(name="")]) -> None:
    """Prints the largest relative difference of loss curves; fails above the tolerance."""
    first, *others = config.implementations
    if not others:
        raise SystemExit("implementations: expected two or more")
    expected = _losses(config, first)
    print(f"{config.dtype}, learning rate {config.learning_rate:g}, {len(expected)} steps")
    print(f"{first}: {expected[0]:.4f} -> {expected[-1]:.4f}", flush=True)
    above = []
    for other in others:
        losses = _losses(config, other)
        differences = np.abs(losses - expected) / expected
        # nan is the largest
        step = int(np.argmax(np.nan_to_num(differences, nan=np.inf)))
        print(
            f"{other}: {losses[0]:.4f} -> {losses[-1]:.4f}; largest relative difference from "
            f"{first} {differences[step]:.2e}, at step {step + 1}",
            flush=True,
        )
        if not differences[step] <= config.tolerance:
            above.append(other)
    if above:
        raise SystemExit(f"{', '.join(above)} above the tolerance of {config.tolerance}")


def _losses(config: ParityConfig, implementation: Implementation) -> np.ndarray:
    """The loss of every step."""
    # not in the extra `benchmarks`: packages that only training needs
    from train.checkpointing.run_directory import METRICS_FILE
    from train.loop import train
    from train.metrics.log import read_metrics

    with tempfile.TemporaryDirectory() as directory:
        result = train(_run(config, implementation, directory))
        if result.signal is not None:
            raise SystemExit(f"stopped by a signal in the run on {implementation}")
        records = read_metrics(Path(directory) / METRICS_FILE)
    return np.array([r["loss"] for r in records if "loss" in r], float)


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
        optimizer=OptimizerConfig(
            learning_rate=config.learning_rate, warmup_steps=min(20, config.steps // 2)
        ),
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
    return dataclasses.replace(base, dtype=config.dtype)
