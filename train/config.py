"""The configuration of a training run: one frozen dataclass, every field a flag of `mdn-train`."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mdn_jax.models.config import MDNConfig
from mdn_jax.models.remat import Remat
from mdn_jax.ops.api import Implementation

# What a run may change when it resumes: nothing that the parameters or the data order depend on,
# but `guard`, which is there to get a run past a place where it failed.
# `data.files` and `data.tokenizer` may, because the checkpoint knows the documents by their digest
# and the run's directory has its tokenizer. `steps` may, because the learning rate follows
# `optimizer.decay_steps`.
CHANGEABLE_ON_RESUME = frozenset(
    {
        "name",
        "output_dir",
        "resume",
        "resume_step",
        "guard.action",
        "guard.loss_deviations",
        "guard.grad_norm_factor",
        "guard.window",
        "guard.patience",
        "report.tensorboard",
        "report.wandb",
        "report.wandb_project",
        "profile",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
        "distributed.enabled",
        "distributed.coordinator",
        "distributed.processes",
        "distributed.index",
        "steps",
        "data.files",
        "data.tokenizer",
        "data.prefetch",
        "data.verify",
        "implementation",
        "remat",
        "log_every",
        "stability_every",
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
        "sample_tokens",
        "sample_prompt",
        "sample_temperature",
    }
)


def _check(name: str, value: object, expected: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which documents, what tokens they become, and how much of them is held out."""

    files: tuple[str, ...] = ()
    """Files or globs ('**' crosses directories): text, JSONL, Parquet or shards of mdn-tokenize, by
    their suffix; or directories of shards, or of Parquet files as Hugging Face lays them out. None:
    the standard library's source text."""

    format: Literal["text", "jsonl", "parquet", "tokens"] | None = None
    """What the files are; None: .jsonl, .ndjson (or .gz of them), .parquet and .tokens say so by
    their suffix, and any other file is a document of text."""

    field: str = "text"
    """Field of JSONL, or column of Parquet and of a data set, that holds the text."""

    dataset: str | None = None
    """Hugging Face data set to stream, by name or local directory; `files` are then data files
    within it, and "json" or "parquet" with `files` streams local files."""

    subset: str | None = None
    """Configuration of the data set."""

    split: str = "train"
    """Split of the data set, or of a directory of Parquet files."""

    revision: str | None = None
    """Branch, tag or commit of the data set; a commit never changes."""

    shuffle_buffer: int = 10_000
    """Documents of a stream that are shuffled together; files are shuffled as a whole."""

    tokenizer: str | None = None
    """A tokenizer.json, a directory with one or with GPT-2's vocab.json and merges.txt, or "bytes".
    None: that of the shards, and bytes for everything else."""

    start_token: str | None = None
    """Token that opens every document; None: what the tokenizer adds by itself, or <|endoftext|>
    if it adds nothing and has that token."""

    held_out_fraction: float = 0.05
    """Share of the documents never trained on; each document's content decides its side."""

    prefetch: int = 4
    """Batches prepared ahead of the step."""

    verify: bool = True
    """Check the digest of every shard at the start, which reads all of it."""

    def __post_init__(self) -> None:
        _check(
            "data.held_out_fraction",
            self.held_out_fraction,
            "a number above 0 and below 1",
            0 < self.held_out_fraction < 1,
        )
        for name in ("prefetch", "shuffle_buffer"):
            value = getattr(self, name)
            _check(f"data.{name}", value, "an int >= 1", value >= 1)
        for name in ("subset", "revision"):
            value, streamed = getattr(self, name), self.dataset is not None
            _check(f"data.{name}", value, "None without data.dataset", streamed or value is None)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up, cosine decay and clipping. The defaults are the published recipe."""

    learning_rate: float = 3e-4
    """Peak learning rate, reached at the end of the warm-up."""

    final_fraction: float = 0.1
    """Learning rate at the end of the decay and after it, as a fraction of the peak."""

    warmup_steps: int = 1024
    """Updates over which the learning rate rises linearly from 0."""

    decay_steps: int | None = None
    """Updates after which the cosine ends, warm-up included; None: `steps` of the first start."""

    beta1: float = 0.9
    """Decay of the first moment."""

    beta2: float = 0.95
    """Decay of the second moment."""

    epsilon: float = 1e-15
    """Added to the root of the second moment."""

    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; gate parameters, norms and biases have none."""

    clip_norm: float = 1.0
    """Largest global norm of the gradient."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon", "clip_norm"):
            value = getattr(self, name)
            _check(f"optimizer.{name}", value, "a finite number > 0", 0 < value < math.inf)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _check(f"optimizer.{name}", value, "a number >= 0 and below 1", 0 <= value < 1)
        fraction, decay = self.final_fraction, self.weight_decay
        _check("optimizer.final_fraction", fraction, "a number from 0 to 1", 0 <= fraction <= 1)
        _check("optimizer.weight_decay", decay, "a finite number >= 0", 0 <= decay < math.inf)
        _check("optimizer.warmup_steps", self.warmup_steps, "an int >= 0", self.warmup_steps >= 0)


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Which steps are refused: the parameters and moments stay as they are, the data goes on.

    A step whose loss or gradient is not finite always is.
    """

    action: Literal["off", "skip", "stop"] = "off"
    """After a spike, a finite loss or gradient far above those before: nothing; refuse the step;
    end the run with an error."""

    loss_deviations: float = 6.0
    """A loss is a spike above the running mean plus so many running standard deviations."""

    grad_norm_factor: float = 10.0
    """A gradient norm is a spike above so many times its running mean."""

    window: int = 128
    """Steps that the running statistics reach back; nothing is a spike before as many."""

    patience: int = 50
    """Refused steps in a row that end the run with an error, whatever the action."""

    def __post_init__(self) -> None:
        _check(
            "guard.loss_deviations", self.loss_deviations, "a number > 0", self.loss_deviations > 0
        )
        factor = self.grad_norm_factor
        _check("guard.grad_norm_factor", factor, "a number > 1", factor > 1)
        _check("guard.window", self.window, "an int >= 2", self.window >= 2)
        _check("guard.patience", self.patience, "an int >= 1", self.patience >= 1)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Where metrics go beside the run's metrics.jsonl."""

    tensorboard: bool = False
    """Event files in the run's directory, for `tensorboard --logdir`; the extra `tensorboard`."""

    wandb: Literal["off", "online", "offline"] = "off"
    """Weights & Biases (the extra `wandb`); offline: in the run's directory, for `wandb sync`."""

    wandb_project: str = "mdn-jax"
    """Project of Weights & Biases."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices share the work; one of the sizes may be -1, the rest of the devices."""

    data: int = -1
    """Copies of the parameters; each takes its rows of the batch."""

    fsdp: int = 1
    """Devices that share parameters, gradients and moments, and take rows of the batch."""

    tensor: int = 1
    """Devices that share the heads and the MLP of the same rows."""

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        for name, size in zip(("data", "fsdp", "tensor"), sizes, strict=True):
            _check(f"mesh.{name}", size, "an int >= 1 or -1", size >= 1 or size == -1)
        _check("mesh", sizes, "-1 in one axis at most", sizes.count(-1) <= 1)


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Several processes as one run, started with the same flags (but `index`) on every host."""

    enabled: Annotated[bool, tyro.conf.arg(name="")] = False
    """Meet the other processes, found from the environment (Slurm, Open MPI, Kubernetes, TPU)."""

    coordinator: str | None = None
    """HOST:PORT of the process with index 0; with it no environment is needed."""

    processes: int | None = None
    """Number of processes; with `coordinator`."""

    index: int | None = None
    """This process's number, from 0; with `coordinator`."""

    def __post_init__(self) -> None:
        together = (self.coordinator, self.processes, self.index)
        fits = together.count(None) in (0, 3)
        _check("distributed", together, "coordinator, processes and index, or none of them", fits)
        if self.processes is not None and self.index is not None:
            _check("distributed.processes", self.processes, "an int >= 1", self.processes >= 1)
            expected = f"from 0 to {self.processes - 1}"
            _check("distributed.index", self.index, expected, 0 <= self.index < self.processes)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    name: str = "run"
    """Name of the run."""

    output_dir: str | None = None
    """Directory of checkpoints, metrics, plot and sample, the same for all processes; None:
    runs/<name>."""

    resume: bool = False
    """Continue from the last checkpoint in the output directory."""

    resume_step: int | None = None
    """With `resume`: continue from the checkpoint of this step; later ones are set aside."""

    model: MDNConfig = field(default_factory=MDNConfig)
    """The model."""

    data: DataConfig = DataConfig()
    """The text."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""

    guard: GuardConfig = GuardConfig()
    """The steps that are not taken."""

    mesh: MeshConfig = MeshConfig()
    """The devices."""

    distributed: DistributedConfig = DistributedConfig()
    """The processes."""

    report: ReportConfig = ReportConfig()
    """Where the metrics go."""

    profile: bool = False
    """Write a trace of a few steps, for TensorBoard or XProf, into the run's directory."""

    steps: int = 30_720
    """Optimizer steps."""

    batch_size: int = 128
    """Rows in one step, over all its micro-batches."""

    sequence_length: int = 4096
    """Tokens in a row."""

    accumulation: int = 1
    """Micro-batches that a step's batch is computed in; the gradient is that of the whole batch."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of activations; parameters, moments and loss are float32."""

    implementation: Implementation | None = None
    """Implementation of the momentum delta rule; None: the best that supports the call."""

    remat: Remat = "none"
    """Activations of each block that are computed again in the backward pass instead of kept: none;
    the states of the rule ("states"); all but outputs of projections and of the rule ("dots"); all
    but those of the rule ("kernel"); all ("block"). Later ones need less memory and more time."""

    seed: int = 42
    """Seed of the initial parameters, the data order and the sample."""

    log_every: int = 10
    """Steps between lines of metrics."""

    stability_every: int = 0
    """Steps between measurements, in every layer, of the share of heads whose gates leave the
    stable region or whose states grow, and of the states' norms (docs/stability.md); 0: none."""

    eval_every: int = 500
    """Steps between measurements of the held-out loss."""

    eval_rows: int = 256
    """Most held-out rows to measure on, always the same; out of more rows, at even distances."""

    checkpoint_every: int = 1000
    """Steps between checkpoints; one is always written at the end. Those at a multiple of
    `eval_every` as well have a held-out loss to be the best by."""

    keep_checkpoints: int = 3
    """Latest checkpoints to keep; that with the lowest held-out loss is kept besides."""

    sample_tokens: int = 256
    """Tokens to generate at the end."""

    sample_prompt: str = ""
    """Text that the generated sample continues; empty: the start of a document."""

    sample_temperature: float = 0.8
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
            _check(name, value, "an int >= 1", value >= 1)
        _check(
            "resume_step",
            self.resume_step,
            "None without resume",
            self.resume or self.resume_step is None,
        )
        _check("name", self.name, "a name without '/'", bool(self.name) and "/" not in self.name)
        _check("seed", self.seed, "an int >= 0", self.seed >= 0)
        _check("sample_tokens", self.sample_tokens, "an int >= 0", self.sample_tokens >= 0)
        _check("stability_every", self.stability_every, "an int >= 0", self.stability_every >= 0)
        temperature = self.sample_temperature
        _check("sample_temperature", temperature, "a number >= 0", 0 <= temperature < math.inf)
        _check("sequence_length", self.sequence_length, "an int >= 2", self.sequence_length >= 2)
        _check(
            "accumulation",
            self.accumulation,
            f"a divisor of batch_size = {self.batch_size}",
            self.batch_size % self.accumulation == 0,
        )
        decay_steps = self.decay_steps
        _check(
            "optimizer.warmup_steps",
            self.optimizer.warmup_steps,
            f"below the {decay_steps} steps of the schedule (optimizer.decay_steps, or steps)",
            self.optimizer.warmup_steps < decay_steps,
        )

    @property
    def decay_steps(self) -> int:
        """Updates after which the learning rate stays where it is."""
        decay_steps = self.optimizer.decay_steps
        return self.steps if decay_steps is None else decay_steps

    @property
    def directory(self) -> Path:
        """The output directory, absolute."""
        return Path(self.output_dir or Path("runs") / self.name).absolute()

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
    parts = dict(values)
    parts["model"] = MDNConfig.from_dict(parts["model"])
    parts["data"] = _build(DataConfig, parts["data"], "data.")
    parts["guard"] = _build(GuardConfig, parts.get("guard", {}), "guard.")
    parts["report"] = _build(ReportConfig, parts.get("report", {}), "report.")
    parts["mesh"] = _build(MeshConfig, parts["mesh"], "mesh.")
    parts["distributed"] = _build(DistributedConfig, parts["distributed"], "distributed.")
    parts["optimizer"] = _build(OptimizerConfig, parts["optimizer"], "optimizer.")
    return _build(TrainConfig, parts, "")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}} -> {"a.b": 1}`, the names that the flags have."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def resume_conflicts(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations (`to_dict`) and may not; one line a field.

    A field that there was none of when the first was saved had its default.
    """
    old, new = flatten(saved), flatten(current)
    old = {name: x for name, x in flatten(to_dict(TrainConfig())).items() if name in new} | old
    return [
        f"{name}: the checkpoint has {old.get(name)!r}, this run {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if name not in CHANGEABLE_ON_RESUME and old.get(name) != new.get(name)
    ]


def _build[C](cls: type[C], values: Mapping[str, Any], prefix: str) -> C:
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise ValueError(
                f"{prefix}{name}: expected one of {sorted(fields)}, got an unknown key"
            )
    # JSON has no tuples
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
