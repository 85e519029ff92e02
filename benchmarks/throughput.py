"""`python -m benchmarks throughput`: training speed at lengths with equal tokens a step."""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import tyro
from tabulate import tabulate

from benchmarks.records import Records
from configs import CONFIGS
from mdn_jax import MDNConfig
from mdn_jax.compiled import compiled_once
from mdn_jax.models.remat import Remat
from mdn_jax.ops.api import Implementation


@dataclass(frozen=True)
class ThroughputConfig:
    """Times the training step of several models on rows of several lengths.

    What is in the output directory already, of the same device, is not measured again.
    """

    models: tuple[str, ...] = (
        "mdn_400m",
        "gdn_400m",
        "comba_400m",
        "kda_400m",
        "mamba2_400m",
        "transformer_400m",
    )
    """Names of configurations, as for `python -m train`."""
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    """Tokens in a row."""
    tokens: int = 32768
    """Tokens in a step, a multiple of every length."""
    repeats: int = 10
    """Steps to time, after two that are not."""
    remat: Remat = "dots"
    """What is kept of a block for the backward pass, for all models; as for `python -m train`."""
    implementation: Implementation | None = None
    """Of the momentum delta rule; "scan" and "xla" of the other rules too; None: the best ones."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of activations."""
    compile_only: bool = False
    """Compile and stop, for several commands at once to do; a later one then only times."""
    output: Path = Path("runs/throughput")
    """Directory of `results.jsonl`, `table.md`, `throughput.png` and compiled programs."""
    smoke: bool = False
    """Whether it runs, not how fast: tiny models and rows."""

    def __post_init__(self) -> None:
        for name in self.models:
            if name not in CONFIGS:
                raise ValueError(f"models: expected some of {', '.join(CONFIGS)}, got {name!r}")
        for length in self.lengths:
            if length < 2 or self.tokens % length:
                raise ValueError(
                    f"lengths: expected divisors of tokens = {self.tokens}, at least 2, "
                    f"got {length}"
                )
        if self.repeats < 1:
            raise ValueError(f"repeats: expected an int >= 1, got {self.repeats!r}")


class Row(NamedTuple):
    """One model at one length.

    Attributes:
      model: name of its configuration.
      length: tokens in a row.
      rows: in a step.
      seconds: of each timed step; none if it did not fit into the memory.
      compile: seconds of compilation.
      peak: most bytes in use so far in the process, if the device says so.
    """

    model: str
    length: int
    rows: int
    seconds: list[float]
    compile: float
    peak: int | None


def throughput(config: Annotated[ThroughputConfig, tyro.conf.arg(name="")]) -> None:
    """Training steps of several models and lengths: speeds as they come, then the table."""
    if jax.default_backend() == "cpu" and not config.smoke:
        raise SystemExit(
            "smoke: expected --smoke on a CPU, for models of 400M parameters, got none"
        )
    if config.smoke:
        config = dataclasses.replace(
            config, lengths=(16,), tokens=32, repeats=2, implementation="scan", dtype="float32"
        )
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}; {config.tokens:,} tokens a step, {config.dtype}")
    apart = ("models", "lengths", "output", "smoke", "compile_only")
    recipe = {name: x for name, x in dataclasses.asdict(config).items() if name not in apart}
    rows: list[Row] = []
    with (
        Records(config.output / "results.jsonl") as records,
        compiled_once(config.output / "compiled"),
    ):
        for name in config.models:
            state = None
            for length in config.lengths:
                setting = {"model": name, "length": length, "config": recipe}
                setting |= {"device": device, "jax": jax.__version__}
                if config.compile_only:
                    seconds = _compile(config, name, length)
                    print(f"{name}, {length:,}: compiled in {seconds:.1f} s", flush=True)
                    continue
                found = records.find(setting)
                if found:
                    row = Row(**{field: found[-1][field] for field in Row._fields})
                else:
                    row, state = _run(config, name, length, state)
                    records.add(setting | row._asdict())
                rows.append(row)
                print(f"{name}, {length:,}: {_speed(row, config.tokens)} tokens/s", flush=True)
    if config.compile_only:
        return
    text = table(rows, config.tokens)
    (config.output / "table.md").write_text(text + "\n")
    draw(rows, config.tokens, config.output / "throughput.png")
    print(text)


def _model(config: ThroughputConfig, name: str) -> MDNConfig:
    model = CONFIGS[name]().model
    if not config.smoke:
        return model
    heads = {"num_heads": 1} | ({"num_v_heads": 2} if model.mixer == "mamba2" else {})
    small = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    mlp = {"intermediate_size": 0 if model.intermediate_size == 0 else 16, "attn": None}
    return dataclasses.replace(model, **heads, **small, **mlp)  # type: ignore[arg-type]


def _step(config: ThroughputConfig, name: str, length: int) -> Any:
    """A `WholeStep`."""
    # not in the extra `benchmarks`: packages that only training needs
    from benchmarks.whole_step import WholeStep
    from train.config import TrainConfig

    return WholeStep(
        TrainConfig(
            name=name,
            model=_model(config, name),
            batch_size=config.tokens // length,
            sequence_length=length,
            remat=config.remat,
            implementation=config.implementation,
            dtype=config.dtype,
        )
    )


def _compile(config: ThroughputConfig, name: str, length: int) -> float:
    """Seconds that it took; the program is in the cache."""
    began = time.perf_counter()
    _step(config, name, length).lower().compile()
    return time.perf_counter() - began


def _run(config: ThroughputConfig, name: str, length: int, state: Any = None) -> tuple[Row, Any]:
    """The times, and the model's training state after them, for the next length.

    Args:
      config: of the benchmark.
      name: of the model.
      length: tokens in a row.
      state: of the same model, after another length; None: a new one.
    """
    began = time.perf_counter()
    seconds: list[float] = []
    rows = config.tokens // length
    try:
        step = _step(config, name, length)
        compiled = step.lower().compile()
        compile_seconds = time.perf_counter() - began
        state = step.initial_state() if state is None else state
        for _ in range(2 + config.repeats):
            began = time.perf_counter()
            state, metrics = compiled(state, step.batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - began)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Row(name, length, rows, [], time.perf_counter() - began, None), None
    used = jax.devices()[0].memory_stats()
    peak = int(used["peak_bytes_in_use"]) if used else None
    return Row(name, length, rows, seconds[2:], compile_seconds, peak), state


def _speed(row: Row, tokens: int) -> str:
    return f"{tokens / statistics.median(row.seconds):,.0f}" if row.seconds else "out of memory"


def table(rows: Sequence[Row], tokens: int) -> str:
    """Tokens a second by the median step, a row a model, a column a length."""
    lengths = list(dict.fromkeys(row.length for row in rows))
    lines = []
    for name in dict.fromkeys(row.model for row in rows):
        own = {row.length: _speed(row, tokens) for row in rows if row.model == name}
        lines.append([name, *(own.get(length, "-") for length in lengths)])
    headers = ["tokens/s", *(f"{length:,}" for length in lengths)]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def draw(rows: Sequence[Row], tokens: int, path: Path) -> None:
    """Tokens a second against length, a line a model; bars: the slowest and the fastest step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, name in enumerate(dict.fromkeys(row.model for row in rows)):
        own = [row for row in rows if row.model == name and row.seconds]
        middle = [tokens / statistics.median(row.seconds) / 1e3 for row in own]
        low = [m - tokens / max(row.seconds) / 1e3 for m, row in zip(middle, own, strict=True)]
        high = [tokens / min(row.seconds) / 1e3 - m for m, row in zip(middle, own, strict=True)]
        axes.errorbar(
            [row.length for row in own],
            middle,
            yerr=[low, high],
            label=name,
            color=f"C{i % 10}",
            marker="osD^vP"[i % 6],
            linestyle="--" if name.startswith("transformer") else "-",
            markersize=5,
            capsize=3,
        )
    lengths = sorted({row.length for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set(xlabel="tokens in a row", ylabel="thousand tokens/s of training", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_suffix(".tmp")
    canvas.print_png(temporary)
    temporary.replace(path)
