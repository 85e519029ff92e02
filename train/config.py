"""The configuration of a training run: one frozen dataclass, every field a flag."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mdn_jax.models.config import MDNConfig
from mdn_jax.models.remat import Remat
from mdn_jax.ops.api import Implementation
from train.config_sections import (
    Autotune,
    DataConfig,
    DistributedConfig,
    GuardConfig,
    MeshConfig,
    OptimizerConfig,
    ReportConfig,
    check,
)
from train.options import build, option


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    name: str = option("run", resume="may change")
    """Name of the run."""

    output_dir: str | None = option(None, resume="may change")
    """Directory of checkpoints, metrics, plot and sample, the same for all processes; None:
    runs/<name>."""

    resume: bool = option(False, resume="may change")
    """Continue from the last checkpoint in the output directory."""

    resume_step: int | None = option(None, resume="may change")
    """With `resume`: continue from the checkpoint of this step; later ones are set aside."""

    init_from: str | None = option(None, resume="may change", processes="own")
    """Begin with the parameters in this directory, of a run, an exported or a published folder. The
    model and the tokenizer are those from there."""

    model: MDNConfig = option(factory=MDNConfig, resume="fixed")
    """The model."""

    fit_vocab_size: bool = option(False, resume="may change")
    """Make `model.vocab_size` the tokenizer's; giving it by a flag or a file turns this off."""

    data: DataConfig = field(default_factory=DataConfig)
    """The text."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""

    guard: GuardConfig = field(default_factory=GuardConfig)
    """The steps that are not taken."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    """The devices."""

    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """The processes."""

    report: ReportConfig = field(default_factory=ReportConfig)
    """Where the metrics go."""

    profile: bool = option(False, resume="may change")
    """Write a trace of a few steps, for TensorBoard or XProf, into the run's directory."""

    steps: int = option(30_720, resume="may change")
    """Optimizer steps."""

    batch_size: int = option(128, resume="fixed")
    """Rows in one step, over all its micro-batches."""

    sequence_length: int = option(4096, resume="fixed")
    """Tokens in a row."""

    accumulation: int = option(1, resume="fixed")
    """Micro-batches that a step's batch is computed in; the gradient is that of the whole batch."""

    dtype: Literal["float32", "bfloat16"] = option("bfloat16", resume="fixed")
    """Type of activations; parameters, moments and loss are float32."""

    implementation: Implementation | None = option(None, resume="may change")
    """Implementation of the momentum delta rule; None: the best that supports the call."""

    remat: Remat = option("none", resume="may change")
    """Activations of each block that are computed again in the backward pass instead of kept: none;
    the states of the rule ("states"); all but outputs of projections and of the rule ("dots"); all
    but those of the rule ("kernel"); all ("block"). Later ones need less memory and more time."""

    scan_layers: bool = option(False, resume="may change")
    """Compile one block for all layers that are alike, or as many as they have before they repeat:
    the first step comes sooner, and each is longer by the copies of what blocks keep. With
    `remat="block"` there is little to copy (docs/performance.md)."""

    autotune: Autotune = option("cublas", resume="may change")
    """What the first step times on a GPU before it takes an algorithm for a matrix product: kernels
    of cuBLAS ("cublas"), these and kernels of Triton ("all"), nothing ("off")."""

    seed: int = option(42, resume="fixed")
    """Seed of the initial parameters, the data order and the sample."""

    log_every: int = option(10, resume="may change")
    """Steps between lines of metrics."""

    stability_every: int = option(0, resume="may change")
    """Steps between measurements, in every layer, of the share of heads whose gates leave the
    stable region or whose states grow, and of the states' norms (docs/stability.md); 0: none."""

    eval_every: int = option(500, resume="may change")
    """Steps between measurements of the held-out loss."""

    eval_rows: int = option(256, resume="fixed")
    """Most held-out rows to measure on, always the same; out of more rows, at even distances."""

    checkpoint_every: int = option(1000, resume="may change")
    """Steps between checkpoints; one is always written at the end. Those at a multiple of
    `eval_every` as well have a held-out loss to be the best by."""

    keep_checkpoints: int = option(3, resume="may change")
    """Latest checkpoints to keep; that with the lowest held-out loss is kept besides."""

    sample_tokens: int = option(256, resume="may change")
    """Tokens to generate at the end; 0: no sample."""

    sample_prompt: str = option("", resume="may change")
    """Text that the generated sample continues; empty: the start of a document."""

    sample_temperature: float = option(0.8, resume="may change")
    """Temperature of the sample; 0: always the likeliest token."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "accumulation",
            "log_every",
            "eval_every",
            "eval_rows",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            value = getattr(self, name)
            check(name, value, "an int >= 1", value >= 1)
        check(
            "resume_step",
            self.resume_step,
            "None without resume",
            self.resume or self.resume_step is None,
        )
        check("name", self.name, "a name without '/'", bool(self.name) and "/" not in self.name)
        check("seed", self.seed, "an int >= 0", self.seed >= 0)
        check("sample_tokens", self.sample_tokens, "an int >= 0", self.sample_tokens >= 0)
        check("stability_every", self.stability_every, "an int >= 0", self.stability_every >= 0)
        temperature = self.sample_temperature
        check("sample_temperature", temperature, "a number >= 0", 0 <= temperature < math.inf)
        check("sequence_length", self.sequence_length, "an int >= 2", self.sequence_length >= 2)
        check(
            "accumulation",
            self.accumulation,
            f"a divisor of batch_size = {self.batch_size}",
            self.batch_size % self.accumulation == 0,
        )
        decay_steps, warmup_steps = self.decay_steps, self.optimizer.warmup_steps
        check(
            "optimizer.warmup_steps",
            warmup_steps,
            f"below the {decay_steps} steps of the schedule (optimizer.decay_steps, or steps)",
            warmup_steps is None or warmup_steps < decay_steps,
        )
        cooldown_steps = self.optimizer.cooldown_steps
        check(
            "optimizer.cooldown_steps",
            cooldown_steps,
            f"at most the {decay_steps} steps of the schedule without its warm-up",
            cooldown_steps is None or cooldown_steps + (warmup_steps or 0) <= decay_steps,
        )

    @property
    def decay_steps(self) -> int:
        """Updates after which the learning rate stays where it is."""
        decay_steps = self.optimizer.decay_steps
        return self.steps if decay_steps is None else decay_steps

    @property
    def directory(self) -> Path:
        """The output directory, absolute; `~` is the home directory."""
        return Path(os.path.expanduser(self.output_dir or Path("runs") / self.name)).absolute()

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one step's batch."""
        return self.batch_size * self.sequence_length

    def resolved(self) -> "TrainConfig":
        """The same configuration with every default that depends on another field filled in."""
        optimizer = dataclasses.replace(self.optimizer, decay_steps=self.decay_steps)
        return dataclasses.replace(self, optimizer=optimizer, output_dir=str(self.directory))


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON values; `from_dict` reads it back."""
    values = dataclasses.asdict(config) | {"model": config.model.to_dict()}
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """The configuration that `to_dict` wrote.

    Raises:
      ValueError: an unknown key, or a value that does not fit, by its name.
    """
    return build(TrainConfig, values)
