"""The parts of a training run's configuration; every field is a flag."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


def check(name: str, value: object, expected: str, holds: bool) -> None:
    """Raises ValueError, by the name of the field, unless it holds."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which documents, what tokens they become, and how much of them is held out."""

    files: tuple[str, ...] = ()
    """Files or globs ('**' crosses directories): text, JSONL, Parquet or shards of tokens, by
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
        check(
            "data.held_out_fraction",
            self.held_out_fraction,
            "a number above 0 and below 1",
            0 < self.held_out_fraction < 1,
        )
        for name in ("prefetch", "shuffle_buffer"):
            value = getattr(self, name)
            check(f"data.{name}", value, "an int >= 1", value >= 1)
        for name in ("subset", "revision"):
            value, streamed = getattr(self, name), self.dataset is not None
            check(f"data.{name}", value, "None without data.dataset", streamed or value is None)


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
            check(f"optimizer.{name}", value, "a finite number > 0", 0 < value < math.inf)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            check(f"optimizer.{name}", value, "a number >= 0 and below 1", 0 <= value < 1)
        fraction, decay = self.final_fraction, self.weight_decay
        check("optimizer.final_fraction", fraction, "a number from 0 to 1", 0 <= fraction <= 1)
        check("optimizer.weight_decay", decay, "a finite number >= 0", 0 <= decay < math.inf)
        check("optimizer.warmup_steps", self.warmup_steps, "an int >= 0", self.warmup_steps >= 0)


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
        check(
            "guard.loss_deviations", self.loss_deviations, "a number > 0", self.loss_deviations > 0
        )
        factor = self.grad_norm_factor
        check("guard.grad_norm_factor", factor, "a number > 1", factor > 1)
        check("guard.window", self.window, "an int >= 2", self.window >= 2)
        check("guard.patience", self.patience, "an int >= 1", self.patience >= 1)


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
            check(f"mesh.{name}", size, "an int >= 1 or -1", size >= 1 or size == -1)
        check("mesh", sizes, "-1 in one axis at most", sizes.count(-1) <= 1)


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
        check("distributed", together, "coordinator, processes and index, or none of them", fits)
        if self.processes is not None and self.index is not None:
            check("distributed.processes", self.processes, "an int >= 1", self.processes >= 1)
            expected = f"from 0 to {self.processes - 1}"
            check("distributed.index", self.index, expected, 0 <= self.index < self.processes)
