"""The parts of a training run's configuration; every field is a flag."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from train.options import option

Autotune = Literal["all", "cublas", "off"]
"""Which algorithms of matrix products are timed, see `TrainConfig.autotune`."""


def check(name: str, value: object, expected: str, holds: bool) -> None:
    """Raises ValueError, by the name of the field, unless it holds."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of a mixture; what it does not state is as of `DataConfig`.

    Attributes:
      name: in the metrics; None: by the first of its files.
      weight: its share of the rows, beside those of the other sources.
      files: as of `DataConfig`, and so are the others.
    """

    name: str | None = None
    weight: float = 1.0
    files: tuple[str, ...] = ()
    format: Literal["text", "jsonl", "parquet", "tokens"] | None = None
    field: str | None = None
    prompt: str | None = None
    messages: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        weight = self.weight
        check("data.sources.weight", weight, "a finite number > 0", 0 < weight < math.inf)
        named = bool(self.files) or self.dataset is not None
        check("data.sources.files", self.files, "names of files, or a dataset", named)

    @property
    def title(self) -> str:
        """The name of a source that states none: the last part of its first path, without globs."""
        path = PurePath(self.files[0] if self.dataset is None else self.dataset)
        return next((part for part in reversed(path.parts) if not set(part) & set("*?[")), "files")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which documents, what tokens they become, and how much of them is held out."""

    files: tuple[str, ...] = option((), resume="may change", processes="own")
    """Files or globs ('**' crosses directories): text, JSONL, Parquet or shards of tokens, by
    their suffix; or directories of these, or of Parquet files as Hugging Face lays them out."""

    standard_library: bool = option(False, resume="may change")
    """Where no documents are named: those of the Python standard library's source text."""

    sources: tuple[SourceConfig, ...] = option((), resume="may change", processes="own")
    """A mixture, in place of `files` and `dataset`: PATHS=WEIGHT for each source (for example
    'books/*.jsonl=3' shards=1), or an object with its fields as JSON."""

    format: Literal["text", "jsonl", "parquet", "tokens"] | None = option(None, resume="fixed")
    """What the files are; None: .jsonl, .ndjson (or .gz of them), .parquet and .tokens say so by
    their suffix, and any other file is a document of text."""

    field: str = option("text", resume="fixed")
    """Field of JSONL, or column of Parquet and of a data set, that holds the text."""

    prompt: str | None = option(None, resume="fixed")
    """Field of the text before `field`, for records of a prompt and its completion: the loss is on
    the completion alone."""

    messages: str | None = option(None, resume="fixed")
    """Field of chats, lists of messages with role and content: the loss is on what the assistant
    says."""

    chat_template: str | None = option(None, resume="may change", processes="own")
    """File with the Jinja template that makes text of chats; None: that beside the tokenizer."""

    dataset: str | None = option(None, resume="fixed")
    """Hugging Face data set to stream, by name or local directory; `files` are then data files
    within it, and "json" or "parquet" with `files` streams local files."""

    subset: str | None = option(None, resume="fixed")
    """Configuration of the data set."""

    split: str = option("train", resume="fixed")
    """Split of the data set, or of a directory of Parquet files."""

    revision: str | None = option(None, resume="fixed")
    """Branch, tag or commit of the data set; a commit never changes."""

    shuffle_buffer: int = option(10_000, resume="fixed")
    """Documents of a stream that are shuffled together; files are shuffled as a whole."""

    tokenizer: str | None = option(None, resume="may change", processes="own")
    """A tokenizer.json, a directory with one or with GPT-2's vocab.json and merges.txt, or "bytes".
    None: that of the shards, and bytes for everything else."""

    start_token: str | None = option(None, resume="fixed")
    """Token that opens every document; None: what the tokenizer adds by itself, or <|endoftext|>
    if it adds nothing and has that token."""

    held_out_fraction: float = option(0.05, resume="fixed")
    """Share of the documents never trained on; each document's content decides its side."""

    prefetch: int = option(4, resume="may change", processes="own")
    """Batches prepared ahead of the step."""

    verify: bool = option(True, resume="may change", processes="own")
    """Check the digest of every shard at the start, which reads all of it."""

    def __post_init__(self) -> None:
        check(
            "data.held_out_fraction",
            self.held_out_fraction,
            "a number above 0 and below 1",
            0 < self.held_out_fraction < 1,
        )
        alone = not (self.files or self.dataset is not None)
        check("data.files", self.files, "none beside data.sources", alone or not self.sources)
        check("data.prompt", self.prompt, "None with data.messages", not self._both)
        for name in ("prefetch", "shuffle_buffer"):
            value = getattr(self, name)
            check(f"data.{name}", value, "an int >= 1", value >= 1)
        for name in ("subset", "revision"):
            value, streamed = getattr(self, name), self.dataset is not None
            check(f"data.{name}", value, "None without data.dataset", streamed or value is None)

    @property
    def _both(self) -> bool:
        return self.prompt is not None and self.messages is not None


def documents_field(config: DataConfig) -> str:
    """The field that names a run's documents, for messages."""
    if config.sources:
        return "data.sources"
    return "data.files" if config.dataset is None else "data.dataset"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule, its schedule and clipping. The defaults are the published recipe."""

    name: Literal["adamw", "muon"] = option("adamw", resume="fixed")
    """AdamW; or Muon for the matrices of the layers' projections and AdamW for all others."""

    schedule: Literal["cosine", "linear", "constant", "wsd"] = option("cosine", resume="fixed")
    """What the learning rate does after the warm-up: it falls to the final fraction, along half a
    cosine or a line; it stays; it stays and falls in the last `cooldown_steps` ("wsd": warm-up,
    stable, decay)."""

    learning_rate: float = option(3e-4, resume="fixed")
    """Peak learning rate, reached at the end of the warm-up."""

    final_fraction: float = option(0.1, resume="fixed")
    """Learning rate at the end of the decay and after it, as a fraction of the peak."""

    warmup_steps: int | None = option(None, resume="fixed")
    """Updates over which the learning rate rises linearly from 0. None: a tenth of those of the
    schedule, at most 1,024."""

    decay_steps: int | None = option(None, resume="fixed")
    """Updates after which the schedule ends, warm-up included; None: `steps` of the first start."""

    cooldown_steps: int | None = option(None, resume="fixed")
    """With the schedule "wsd": updates of its decay; None: a fifth of those of the schedule."""

    beta1: float = option(0.9, resume="fixed")
    """Decay of the first moment."""

    beta2: float = option(0.95, resume="fixed")
    """Decay of the second moment."""

    epsilon: float = option(1e-15, resume="fixed")
    """Added to the root of the second moment."""

    muon_beta: float = option(0.95, resume="fixed")
    """With "muon": decay of the momentum that it makes orthogonal."""

    ema_decay: float | None = option(None, resume="fixed")
    """Decay, for each update, of a moving average of the parameters. The run measures its held-out
    loss too, and `--ema` of the other commands takes it. None: there is none."""

    weight_decay: float = option(0.1, resume="fixed")
    """Decoupled weight decay of matrices; gate parameters, norms and biases have none."""

    clip_norm: float = option(1.0, resume="fixed")
    """Largest global norm of the gradient."""

    frozen: tuple[str, ...] = option((), resume="fixed")
    """Patterns of parameters that stay as they are, without moments: embeddings, layers.0,
    'layers.*.mlp'; '*' stands for anything."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon", "clip_norm"):
            value = getattr(self, name)
            check(f"optimizer.{name}", value, "a finite number > 0", 0 < value < math.inf)
        for name in ("beta1", "beta2", "muon_beta"):
            value = getattr(self, name)
            check(f"optimizer.{name}", value, "a number >= 0 and below 1", 0 <= value < 1)
        fraction, decay = self.final_fraction, self.weight_decay
        check("optimizer.final_fraction", fraction, "a number from 0 to 1", 0 <= fraction <= 1)
        check("optimizer.weight_decay", decay, "a finite number >= 0", 0 <= decay < math.inf)
        ema, cooldown = self.ema_decay, self.cooldown_steps
        fits = ema is None or 0 <= ema < 1
        check("optimizer.ema_decay", ema, "None or a number >= 0 and below 1", fits)
        fits = cooldown is None or (cooldown >= 1 and self.schedule == "wsd")
        check("optimizer.cooldown_steps", cooldown, "None, or an int >= 1 with wsd", fits)
        check(
            "optimizer.warmup_steps",
            self.warmup_steps,
            "an int >= 0",
            self.warmup_steps is None or self.warmup_steps >= 0,
        )


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Which steps are refused: the parameters and moments stay as they are, the data goes on.

    A step whose loss or gradient is not finite always is.
    """

    action: Literal["off", "skip", "stop"] = option("off", resume="may change")
    """After a spike, a finite loss or gradient far above those before: nothing; refuse the step;
    end the run with an error."""

    loss_deviations: float = option(6.0, resume="may change")
    """A loss is a spike above the running mean plus so many running standard deviations."""

    grad_norm_factor: float = option(10.0, resume="may change")
    """A gradient norm is a spike above so many times its running mean."""

    window: int = option(128, resume="may change")
    """Steps that the running statistics reach back; nothing is a spike before as many."""

    patience: int = option(50, resume="may change")
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

    tensorboard: bool = option(False, resume="may change")
    """Event files in the run's directory, for `tensorboard --logdir`; the extra `tensorboard`."""

    wandb: Literal["off", "online", "offline"] = option("off", resume="may change")
    """Weights & Biases (the extra `wandb`); offline: in the run's directory, for `wandb sync`."""

    wandb_project: str = option("mdn-jax", resume="may change")
    """Project of Weights & Biases."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices share the work; one of the sizes may be -1, the rest of the devices."""

    data: int = option(-1, resume="may change")
    """Copies of the parameters; each takes its rows of the batch."""

    fsdp: int = option(1, resume="may change")
    """Devices that share parameters, gradients and moments, and take rows of the batch."""

    context: int = option(1, resume="may change")
    """Devices that share the tokens of the same rows, each an equal stretch of every row."""

    tensor: int = option(1, resume="may change")
    """Devices that share the heads and the MLP of the same rows."""

    def __post_init__(self) -> None:
        named = dataclasses.asdict(self)
        sizes = tuple(named.values())
        for name, size in named.items():
            check(f"mesh.{name}", size, "an int >= 1 or -1", size >= 1 or size == -1)
        check("mesh", sizes, "-1 in one axis at most", sizes.count(-1) <= 1)


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Several processes as one run, started with the same flags (but `index`) on every host."""

    enabled: bool = option(False, resume="may change")
    """Meet the other processes, found from the environment (Slurm, Open MPI, Kubernetes, TPU). The
    flag is --distributed for short."""

    coordinator: str | None = option(None, resume="may change", processes="own")
    """HOST:PORT of the process with index 0; with it no environment is needed."""

    processes: int | None = option(None, resume="may change")
    """Number of processes; with `coordinator`."""

    index: int | None = option(None, resume="may change", processes="own")
    """This process's number, from 0; with `coordinator`."""

    def __post_init__(self) -> None:
        together = (self.coordinator, self.processes, self.index)
        fits = together.count(None) in (0, 3)
        check("distributed", together, "coordinator, processes and index, or none of them", fits)
        if self.processes is not None and self.index is not None:
            check("distributed.processes", self.processes, "an int >= 1", self.processes >= 1)
            expected = f"from 0 to {self.processes - 1}"
            check("distributed.index", self.index, expected, 0 <= self.index < self.processes)
