"""`python -m benchmarks language`: every mixer, hybrids, and MDN without its parts, on text."""

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from benchmarks.corpus.manifest import HELD_OUT, read_manifest
from benchmarks.equal_models import model_size
from benchmarks.language import report
from benchmarks.language.divergence import describe
from benchmarks.language.measure import Sizes
from benchmarks.language.models import Ablation, Hybrid, Model, make_models
from benchmarks.language.run import How, Recipe, Source, train_and_measure
from benchmarks.language.smoke import SMOKE, tiny_corpus
from benchmarks.mqar.group import Clock
from benchmarks.records import Records
from benchmarks.runs import working_commit
from mdn_jax.compiled import compiled_once
from mdn_jax.models import Mixer
from mdn_jax.ops.api import Implementation


@dataclass(frozen=True)
class LanguageConfig:
    """Trains models of equal parameters on the same text and compares held-out bits per byte.

    The defaults are 30M parameters without embeddings and 301M tokens. A command that was cut short
    goes on from the last checkpoint; finished runs are not repeated.
    """

    corpus: Path | None = None
    """Directory of `python -m benchmarks corpus`, whose test documents are measured on as well."""
    files: tuple[str, ...] = ()
    """Without a corpus, files or globs ('**' crosses directories), read as bytes; none: the
    standard library's source text."""
    mixers: tuple[Mixer, ...] = (
        "mdn",
        "gdn",
        "attention",
        "kda",
        "comba",
        "gdn2",
        "mamba2",
        "mamba3",
        "titans",
    )
    """Models to compare, none or more; each with one mixer in all layers."""
    hybrids: tuple[Hybrid, ...] = ()
    """Mixers of models with softmax attention in every fourth layer, as well."""
    ablations: tuple[Ablation, ...] = ()
    """MDN without one of its parts at MDN's learning rate, as well; the paper's five are the
    choices."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is one initialisation and one order of the data, the same for all models."""
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    """Peaks, all tried with the first seed; the other seeds have the best one of each model."""
    hidden_size: int = 512
    """Width of the models."""
    layers: int = 8
    """Layers of the models."""
    heads: int = 4
    """Key heads of the models."""
    steps: int = 4600
    """Optimizer steps."""
    batch_size: int = 32
    """Rows in a step."""
    sequence_length: int = 2048
    """Tokens in a row."""
    accumulation: int = 1
    """Micro-batches of a step."""
    warmup_steps: int = 200
    """Updates up to the peak."""
    eval_every: int = 230
    """Steps between measurements of the held-out loss, and between checkpoints."""
    eval_rows: int = 256
    """Most held-out rows to measure on, always the same."""
    stability_every: int = 50
    """Steps between measurements of the gates and states of MDN (docs/stability.md); 0: none."""
    domain_rows: int = 256
    """Most test rows of each domain."""
    position_length: int = 16_384
    """Tokens of the test documents that the loss by position is of."""
    position_rows: int = 64
    """Most of these documents."""
    needle_lengths: tuple[int, ...] = (2048, 4096, 8192, 16_384)
    """Tokens of the rows with a number to find again."""
    needle_rows: int = 64
    """Of these rows, of each length."""
    implementation: Implementation | None = None
    """Of the momentum delta rule; "scan" and "xla" of the other rules too; None: the best ones."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of activations."""
    keep_checkpoints: bool = False
    """Keep the last checkpoint of runs that are done."""
    minutes: float | None = None
    """The command stops cleanly when these are over, and goes on when it is called again."""
    commit: str | None = None
    """What the records name; None: what git says of the working directory."""
    report: tuple[Path, ...] = ()
    """Files of records to write the tables and figures of; nothing is trained."""
    output: Path = Path("runs/language")
    """Directory of the runs, of `results.jsonl`, tables, figures and compiled programs."""
    smoke: bool = False
    """Whether it runs, not how well: tiny models, few steps, a corpus of a few files."""

    def __post_init__(self) -> None:
        if not (self.mixers or self.hybrids or self.ablations):
            raise ValueError(
                "mixers: expected at least one model, or hybrids, or ablations, got none"
            )
        for name in ("seeds", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one, got none")
        if self.ablations and "mdn" not in self.mixers and len(self.learning_rates) > 1:
            raise ValueError(
                "ablations: expected mdn among the mixers, whose learning rate they have, or one "
                f"learning rate, got mixers {self.mixers!r}"
            )
        if self.hybrids and self.layers < 4 and not self.smoke:
            raise ValueError(f"layers: expected an int >= 4 with hybrids, got {self.layers!r}")
        if self.corpus is not None and self.files:
            raise ValueError(f"files: expected none with a corpus, got {self.files!r}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes: expected a number > 0 or None, got {self.minutes!r}")


def language(config: Annotated[LanguageConfig, tyro.conf.arg(name="")]) -> None:
    """Language models on a corpus: records as runs finish, then tables and figures."""
    from mdn_jax.errors import RunError

    if config.report:
        print(report.write(report.read(config.report), config.output))
        return
    if config.smoke:
        layers = 4 if config.hybrids else 1
        config = dataclasses.replace(config, **SMOKE, layers=layers)
        if config.corpus is None and not config.files:
            config = dataclasses.replace(config, corpus=tiny_corpus(config.output / "corpus"))
    clock = Clock(config.minutes)
    commit = config.commit or working_commit(needed=not config.smoke)
    try:
        source = _source(config)
        recipe, models = _recipe(config, source), models_of(config, source)
    except RunError as error:
        raise SystemExit(str(error)) from None
    per_run = config.steps * config.batch_size * config.sequence_length
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, commit {commit}")
    print(f"{per_run:,} tokens a run{_passes(source, per_run)}, {len(models)} models", flush=True)
    with (
        Records(config.output / "results.jsonl") as records,
        compiled_once(config.output / "compiled"),
    ):
        complete = _train(config, recipe, source, models, records, clock, commit)
        found = records.find({"experiment": "language", "recipe": recipe._asdict()})
    if found:
        print(report.write(found, config.output))
    if not complete:
        print(f"The {config.minutes:g} minutes are over; the same command goes on.")


def _source(config: LanguageConfig) -> Source:
    if config.corpus is None:
        return Source(config.files, 0.05, None)
    read_manifest(config.corpus)  # raises
    return Source((str(config.corpus / "shards" / "documents"),), HELD_OUT, config.corpus)


def _passes(source: Source, tokens: int) -> str:
    """How often a run sees a corpus, in words."""
    if source.corpus is None:
        return ""
    from train.data.shards import read_header

    paths = Path(source.files[0]).glob("*.tokens")
    return f" ({tokens / sum(read_header(path).tokens for path in paths):.2f} passes)"


def _recipe(config: LanguageConfig, source: Source) -> Recipe:
    data: Any = source.files
    if source.corpus is not None:  # wherever it lies
        from train.data.shards import read_header

        paths = sorted((source.corpus / "shards").rglob("*.tokens"))
        digests = [read_header(path).sha256 for path in paths]
        data = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
    sizes = Sizes(
        tokens=config.batch_size * config.sequence_length // config.accumulation,
        sequence_length=config.sequence_length,
        domain_rows=config.domain_rows,
        position_length=config.position_length,
        position_rows=config.position_rows,
        needle_lengths=config.needle_lengths,
        needle_rows=config.needle_rows,
    )
    return Recipe(
        data=data,
        hidden_size=config.hidden_size,
        layers=config.layers,
        heads=config.heads,
        steps=config.steps,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        warmup_steps=config.warmup_steps,
        eval_every=config.eval_every,
        eval_rows=config.eval_rows,
        dtype=config.dtype,
        sizes=sizes._asdict(),
    )


def models_of(config: LanguageConfig, source: Source) -> list[Model]:
    """The models, for the tokens of the text."""
    from train.config_sections import DataConfig
    from train.data.sources import find_source

    data = DataConfig(files=source.files, standard_library=True)
    return make_models(
        config.mixers,
        config.hybrids,
        config.ablations,
        vocab_size=find_source(data).tokenizer.vocab_size,
        hidden_size=config.hidden_size,
        layers=config.layers,
        heads=config.heads,
    )


def _train(
    config: LanguageConfig,
    recipe: Recipe,
    source: Source,
    models: list[Model],
    records: Records,
    clock: Clock,
    commit: str,
) -> bool:
    """Whether all is done."""
    from mdn_jax.errors import RunError

    how = How(
        config.accumulation, config.implementation, config.stability_every, config.keep_checkpoints
    )
    for model, seed, rate in _runs(config, recipe, models, records):
        if not clock.allows(0):
            return False
        name = f"{model.name}-{rate:g}-{seed}"
        try:
            outcome = train_and_measure(
                model,
                seed,
                rate,
                recipe,
                source,
                how,
                directory=config.output / name,
                stop=lambda: not clock.allows(0),
            )
        except RunError as error:
            raise SystemExit(f"{name}: {error}") from None
        if outcome is None:
            return False
        records.add(_setting(model, seed, rate, recipe) | outcome | _about(model, commit))
        ending = report.ending(outcome["bits"], outcome["diverged"])
        print(f"{model.shown}, seed {seed}, rate {rate:g}: {ending}")
        if said := describe(outcome["stability"]):
            print(f"  {said}", flush=True)
    return True


def _runs(
    config: LanguageConfig, recipe: Recipe, models: list[Model], records: Records
) -> Iterator[tuple[Model, int, float]]:
    """What is not there yet, when it is asked for: rates with the first seed, then seeds."""

    def missing(model: Model, seed: int, rate: float) -> bool:
        return not records.find(_setting(model, seed, rate, recipe))

    first, *others = config.seeds
    for model in models:
        for rate in config.learning_rates:
            if model.rate_of is None and missing(model, first, rate):
                yield model, first, rate
    for seed in (first, *others):
        for model in models:
            best = _best(config, recipe, model.rate_of or model.name, first, records)
            if missing(model, seed, best):
                yield model, seed, best


def _best(config: LanguageConfig, recipe: Recipe, name: str, seed: int, records: Records) -> float:
    """The learning rate with the fewest bits on the documents held out for the choice."""

    def bits(rate: float) -> float:
        setting = {"experiment": "language", "model": name, "seed": seed, "learning_rate": rate}
        found = records.find({**setting, "recipe": recipe._asdict()})
        return found[-1]["bits"] if found and found[-1]["bits"] is not None else float("inf")

    return min(config.learning_rates, key=bits)


def _setting(model: Model, seed: int, rate: float, recipe: Recipe) -> dict[str, Any]:
    """What a record is found by."""
    return {
        "experiment": "language",
        "model": model.name,
        "seed": seed,
        "learning_rate": rate,
        "recipe": recipe._asdict(),
    }


def _about(model: Model, commit: str) -> dict[str, Any]:
    size = model_size(model.config)
    embeddings = model.config.vocab_size * model.config.hidden_size
    return {
        "shown": model.shown,
        "parameters": size.parameters,
        "without_embeddings": size.parameters - embeddings,
        "state": size.state,
        "commit": commit,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
