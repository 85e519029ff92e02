"""One run of `python -m benchmarks language`: the loop of `python -m train`, then the test."""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.language.divergence import explain
from benchmarks.language.measure import Sizes, Trained, measure
from benchmarks.language.models import Model
from mdn_jax.new_file import write_text
from mdn_jax.ops.api import Implementation


class Recipe(NamedTuple):
    """What all runs of a comparison have alike.

    Attributes:
      data: digest of the shards, or names of the files.
      hidden_size: width.
      layers: number of layers.
      heads: key heads.
      steps: optimizer steps.
      batch_size: rows in a step.
      sequence_length: tokens in a row.
      warmup_steps: updates up to the peak of the learning rate.
      eval_every: steps between measurements of the held-out loss.
      eval_rows: most held-out rows to measure on.
      dtype: of activations.
      sizes: of the test.
    """

    data: Any
    hidden_size: int
    layers: int
    heads: int
    steps: int
    batch_size: int
    sequence_length: int
    warmup_steps: int
    eval_every: int
    eval_rows: int
    dtype: Any
    sizes: dict[str, Any]


class Source(NamedTuple):
    """Where the text is.

    Attributes:
      files: to train on.
      held_out_fraction: of their documents, for the choice of the learning rate.
      corpus: whose test documents are measured on; None: there are none.
    """

    files: tuple[str, ...]
    held_out_fraction: float
    corpus: Path | None


class How(NamedTuple):
    """What changes nothing of a run's result, but for rounding.

    Attributes:
      accumulation: micro-batches of a step.
      implementation: of the rules.
      stability_every: steps between measurements of the gates and states of MDN; 0: none.
      keep_checkpoints: of runs that are done.
    """

    accumulation: int
    implementation: Implementation | None
    stability_every: int
    keep_checkpoints: bool


def train_and_measure(
    model: Model,
    seed: int,
    learning_rate: float,
    recipe: Recipe,
    source: Source,
    how: How,
    *,
    directory: Path,
    stop: Callable[[], bool],
) -> dict[str, Any] | None:
    """Trains from the start or the last checkpoint.

    Args:
      model: to train.
      seed: of parameters and the order of the data.
      learning_rate: at its peak.
      recipe: of all runs.
      source: of the text.
      how: it is computed.
      directory: of the run.
      stop: whether the time is over; asked after every step.

    Returns:
      None if the time was over; there is a checkpoint. Else, as JSON values: bits (held-out bits
      per byte at the end, None if not finite), curve (tokens, bits), skipped (steps), diverged
      (step or None), stability (`divergence.explain`), what `measure.measure` returns (None if it
      diverged), minutes (of all calls).

    Raises:
      SystemExit: a signal.
      RunError: something that the user can put right.
    """
    # not in the extra `benchmarks`: packages that only training needs
    from train.checkpointing.run_directory import METRICS_FILE
    from train.data.sources import find_source
    from train.guard import DivergedError
    from train.loop import train
    from train.metrics.log import read_metrics

    config = _configuration(model, seed, learning_rate, recipe, source, how, directory)
    began, before, over = time.monotonic(), _minutes(directory), False

    def stopped() -> bool:
        nonlocal over
        over = over or stop()
        return over

    def minutes() -> float:
        return before + (time.monotonic() - began) / 60

    diverged, measured, bits = None, None, None
    try:
        result = train(config, stop=stopped)
        if result.signal is not None and not over:
            raise SystemExit(f"stopped by a signal in the run of {model.shown}, seed {seed}")
        if stopped():
            _remember(directory, minutes())
            return None
        tokenizer = find_source(config.data).tokenizer
        bits = _bits(result.held_out_loss, result.bytes_per_token)
        trained = Trained(
            model.config,
            result.state.params,
            implementation=how.implementation,
            dtype=recipe.dtype,
        )
        measured = measure(trained, source.corpus, tokenizer, Sizes(**recipe.sizes))
    except DivergedError as error:
        diverged = error.step
    records = read_metrics(directory / METRICS_FILE)
    per_step = recipe.batch_size * recipe.sequence_length
    if not how.keep_checkpoints:
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    return {
        "bits": bits,
        "curve": [
            [int(r["step"] or 0) * per_step, _bits(r["held_out_nats_per_byte"], 1.0)]
            for r in records
            if "held_out_nats_per_byte" in r
        ],
        "skipped": int(max((r.get("skipped") or 0 for r in records), default=0)),
        "diverged": diverged,
        "stability": explain(records),
        **(measured or {"domains": {}, "positions": [], "position_documents": 0, "needle": {}}),
        "minutes": minutes(),
    }


def _configuration(
    model: Model,
    seed: int,
    learning_rate: float,
    recipe: Recipe,
    source: Source,
    how: How,
    directory: Path,
) -> Any:
    from train.checkpointing.checkpoints import has_checkpoint
    from train.config import TrainConfig
    from train.config_sections import DataConfig, OptimizerConfig

    return TrainConfig(
        name=model.name,
        output_dir=str(directory),
        resume=has_checkpoint(directory),
        model=model.config,
        data=DataConfig(
            files=source.files,
            standard_library=True,
            held_out_fraction=source.held_out_fraction,
        ),
        optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=recipe.warmup_steps),
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        sequence_length=recipe.sequence_length,
        accumulation=how.accumulation,
        dtype=recipe.dtype,
        implementation=how.implementation,
        seed=seed,
        stability_every=how.stability_every if "mdn" in model.config.mixers else 0,
        eval_every=recipe.eval_every,
        eval_rows=recipe.eval_rows,
        checkpoint_every=recipe.eval_every,
        keep_checkpoints=1,
        sample_tokens=0,
    )


def _bits(nats: float | None, bytes_per_token: float) -> float | None:
    if nats is None or not math.isfinite(nats):
        return None
    return nats / bytes_per_token / math.log(2)


def _minutes(directory: Path) -> float:
    """That earlier calls took for the run."""
    path = directory / "minutes.json"
    return float(json.loads(path.read_text())) if path.exists() else 0.0


def _remember(directory: Path, minutes: float) -> None:
    write_text(directory / "minutes.json", json.dumps(minutes) + "\n")
