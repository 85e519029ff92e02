"""`python -m benchmarks language`: every mixer, and MDN without its parts, on real text."""

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import tyro
from tabulate import tabulate

from benchmarks.equal_models import SHOWN, model_config, model_size
from benchmarks.records import Records, compiled_once
from mdn_jax import MDNConfig
from mdn_jax.models import Mixer
from mdn_jax.ops.api import Implementation

Ablation = Literal[
    "no-momentum", "no-output-correction", "no-beta-bound", "no-alpha-bound", "no-mu-clamp"
]

# MDN's fields without one of its parts
_ABLATIONS: dict[Ablation, dict[str, Any]] = {
    "no-momentum": {"use_momentum": False},
    "no-output-correction": {"use_output_correction": False},
    "no-beta-bound": {"bound": "alpha"},
    "no-alpha-bound": {"bound": "beta"},
    "no-mu-clamp": {"min_log_mu": None},
}


@dataclass(frozen=True)
class LanguageConfig:
    """Trains models of equal parameters on the same bytes and compares held-out bits per byte.

    A command that was cut short goes on from the last checkpoint; finished runs are not repeated.
    """

    files: tuple[str, ...] = ()
    """Files or globs ('**' crosses directories); none: the standard library's source text."""
    mixers: tuple[Mixer, ...] = (
        "mdn",
        "gdn",
        "kda",
        "comba",
        "gdn2",
        "mamba2",
        "mamba3",
        "titans",
        "attention",
    )
    """Models to compare, none or more."""
    ablations: tuple[Ablation, ...] = ()
    """MDN without one of its parts, as well; the paper's five are the choices."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is one initialisation and one order of the data, the same for all models."""
    hidden_size: int = 512
    """Width of the models."""
    layers: int = 8
    """Layers of the models."""
    heads: int = 4
    """Key heads of the models."""
    steps: int = 4000
    """Optimizer steps."""
    batch_size: int = 32
    """Rows in a step."""
    sequence_length: int = 1024
    """Bytes in a row."""
    accumulation: int = 1
    """Micro-batches of a step."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 200
    """Updates up to the peak."""
    eval_every: int = 250
    """Steps between measurements of the held-out loss."""
    eval_rows: int = 512
    """Most held-out rows to measure on, always the same."""
    implementation: Implementation | None = None
    """Of the momentum delta rule; "scan" and "xla" of the other rules too; None: the best ones."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of activations."""
    output: Path = Path("runs/language")
    """Directory of the runs, of `results.jsonl`, `table.md`, `curves.png` and compiled programs."""
    smoke: bool = False
    """Whether it runs, not how well: tiny models, few steps."""

    def __post_init__(self) -> None:
        if not self.mixers and not self.ablations:
            raise ValueError("mixers: expected at least one model, or ablations, got none")
        if not self.seeds:
            raise ValueError("seeds: expected at least one, got none")


_SMOKE: dict[str, Any] = {
    "seeds": (0,),
    "hidden_size": 16,
    "layers": 1,
    "heads": 1,
    "steps": 4,
    "batch_size": 2,
    "sequence_length": 16,
    "accumulation": 1,
    "warmup_steps": 1,
    "eval_every": 2,
    "eval_rows": 4,
    "implementation": "scan",
    "dtype": "float32",
}


class Outcome(NamedTuple):
    """Of one run.

    Attributes:
      model: its name in the table.
      seed: of parameters and data.
      parameters: all of them.
      state: numbers that a row needs to go on; None where it grows.
      bits: held-out bits per byte at the end; None if it did not come to it or they are not finite.
      skipped: steps left out because the loss or the gradient was not finite.
      diverged: step at which the guard ended the run; None if it did not.
      curve: bytes trained on and held-out bits per byte at each measurement.
      seconds: of this call.
    """

    model: str
    seed: int
    parameters: int
    state: int | None
    bits: float | None
    skipped: int
    diverged: int | None
    curve: list[tuple[int, float | None]]
    seconds: float


def language(config: Annotated[LanguageConfig, tyro.conf.arg(name="")]) -> None:
    """Writes results as they come, then the table and the curves."""
    from mdn_jax.errors import RunError

    if config.smoke:
        config = dataclasses.replace(config, **_SMOKE)
    device = jax.devices()[0].device_kind
    models = _models(config)
    per_run = config.steps * config.batch_size * config.sequence_length
    print(f"{device}, jax {jax.__version__}; {per_run:,} bytes a run, {len(config.seeds)} seeds")
    outcomes: list[Outcome] = []
    with Records(config.output / "results.jsonl") as records, compiled_once(config.output):
        for name, model in models.items():
            for seed in config.seeds:
                setting = {"model": name, "seed": seed, "config": _recipe(config)}
                found = records.find(setting)
                if found:
                    outcome = Outcome(**{field: found[-1][field] for field in Outcome._fields})
                else:
                    try:
                        outcome = _run(config, name, model, seed)
                    except RunError as error:
                        raise SystemExit(f"{name}, seed {seed}: {error}") from None
                    records.add({**setting, **outcome._asdict(), "device": device})
                outcomes.append(outcome)
                print(f"{name}, seed {seed}: {_ending(outcome)}", flush=True)
    text = table(outcomes)
    (config.output / "table.md").write_text(text + "\n")
    draw(outcomes, config.output / "curves.png")
    print(text)


def _recipe(config: LanguageConfig) -> dict[str, Any]:
    """What every run of a comparison has alike."""
    apart = ("mixers", "ablations", "seeds", "output", "smoke")
    return {name: x for name, x in dataclasses.asdict(config).items() if name not in apart}


def _models(config: LanguageConfig) -> dict[str, MDNConfig]:
    """The models by their names in the table."""
    from mdn_jax.text.tokenizer import VOCAB_SIZE

    def make(mixer: Mixer) -> MDNConfig:
        return model_config(
            mixer,
            vocab_size=VOCAB_SIZE,
            hidden_size=config.hidden_size,
            layers=config.layers,
            heads=config.heads,
            equal="parameters",
        )

    models = {SHOWN[mixer]: make(mixer) for mixer in config.mixers}
    for ablation in config.ablations:
        name = f"MDN, {ablation.replace('-', ' ')}"
        models[name] = dataclasses.replace(make("mdn"), **_ABLATIONS[ablation])
    return models


def _run(config: LanguageConfig, name: str, model: MDNConfig, seed: int) -> Outcome:
    # not in the extra `benchmarks`: packages that only training needs
    from train.checkpointing.checkpoints import has_checkpoint
    from train.checkpointing.run_directory import METRICS_FILE
    from train.config import TrainConfig
    from train.config_sections import DataConfig, OptimizerConfig
    from train.guard import DivergedError
    from train.loop import train
    from train.metrics.log import read_metrics

    slug = name.lower().replace(", ", "-").replace(" ", "-")
    directory = config.output / f"{slug}-{seed}"
    began = time.perf_counter()
    run = TrainConfig(
        name=slug,
        output_dir=str(directory),
        resume=has_checkpoint(directory),
        model=model,
        data=DataConfig(files=config.files, standard_library=True),
        optimizer=OptimizerConfig(
            learning_rate=config.learning_rate, warmup_steps=config.warmup_steps
        ),
        steps=config.steps,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        accumulation=config.accumulation,
        dtype=config.dtype,
        implementation=config.implementation,
        seed=seed,
        eval_every=config.eval_every,
        eval_rows=config.eval_rows,
        checkpoint_every=config.eval_every,
        keep_checkpoints=1,
        sample_tokens=0,
    )
    bits, diverged = None, None
    try:
        result = train(run)
        if result.signal is not None:
            raise SystemExit(f"stopped by a signal in the run of {name}, seed {seed}")
        bits = _bits(result.held_out_loss)
    except DivergedError as error:
        diverged = error.step
    records = read_metrics(directory / METRICS_FILE)
    per_step = config.batch_size * config.sequence_length
    size = model_size(model)
    return Outcome(
        model=name,
        seed=seed,
        parameters=size.parameters,
        state=size.state,
        bits=bits,
        skipped=int(max((record.get("skipped") or 0 for record in records), default=0)),
        diverged=diverged,
        curve=[
            (int(record["step"] or 0) * per_step, _bits(record["held_out_loss"]))
            for record in records
            if "held_out_loss" in record
        ],
        seconds=time.perf_counter() - began,
    )


def _ending(outcome: Outcome) -> str:
    if outcome.diverged is not None:
        return f"diverged at step {outcome.diverged:,}"
    return "not finite" if outcome.bits is None else f"{outcome.bits:.4f} bits per byte"


def _bits(nats: float | None) -> float | None:
    return nats / math.log(2) if nats is not None and math.isfinite(nats) else None


def table(outcomes: Sequence[Outcome]) -> str:
    """Bits per byte, mean and standard deviation over seeds, a row a model."""
    lines = []
    for name in dict.fromkeys(outcome.model for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.model == name]
        bits = [outcome.bits for outcome in own if outcome.bits is not None]
        ends = [_ending(outcome) for outcome in own if outcome.bits is None]
        if bits:
            deviation = statistics.stdev(bits) if len(bits) > 1 else 0.0
            ends.insert(0, f"{statistics.fmean(bits):.4f} ± {deviation:.4f}")
        state = own[0].state
        lines.append(
            [
                name,
                f"{own[0].parameters:,}",
                "grows" if state is None else f"{state:,}",
                "; ".join(ends),
                f"{sum(outcome.skipped for outcome in own)}",
            ]
        )
    headers = ["", "parameters", "state", "held-out bits per byte", "steps skipped, all seeds"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Held-out bits per byte against bytes trained on; bands: least and most of the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    last = 0.0
    for i, name in enumerate(dict.fromkeys(outcome.model for outcome in outcomes)):
        points: dict[int, list[float]] = {}
        for outcome in outcomes:
            if outcome.model == name:
                for seen, bits in outcome.curve:
                    if bits is not None:
                        points.setdefault(seen, []).append(bits)
        if not points:
            continue
        xs = sorted(points)
        color = f"C{i % 10}"
        style = "-" if i < 6 else "--"
        millions = [x / 1e6 for x in xs]
        means = [statistics.fmean(points[x]) for x in xs]
        last = max(last, means[-1])
        axes.plot(millions, means, style, label=name, color=color, lw=1.5)
        low, high = ([pick(points[x]) for x in xs] for pick in (min, max))
        axes.fill_between(millions, low, high, color=color, alpha=0.15, lw=0)
    axes.set(xlabel="million bytes trained on", ylabel="held-out bits per byte")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.set_ylim(top=1.25 * last)  # the ends are compared; a start far above them is cut
        figure.legend(loc="outside right upper")
    temporary = path.with_suffix(".tmp")
    canvas.print_png(temporary)
    temporary.replace(path)
