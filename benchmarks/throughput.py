"""`mdn-bench throughput`: tokens a second of training, at lengths with equal tokens a step."""

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from tabulate import tabulate

from configs import CONFIGS
from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.models.remat import Remat
from mdn_jax.ops.api import Implementation


@dataclass(frozen=True)
class ThroughputConfig:
    """Times the training step of several models on rows of several lengths."""

    models: tuple[str, ...] = (
        "mdn_400m",
        "gdn_400m",
        "comba_400m",
        "kda_400m",
        "mamba2_400m",
        "transformer_400m",
    )
    """Names of configurations, as for `mdn-train`."""
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    """Tokens in a row."""
    tokens: int = 32768
    """Tokens in a step, a multiple of every length."""
    repeats: int = 10
    """Steps to time, after two that are not."""
    remat: Remat = "dots"
    """What is kept of a block for the backward pass, for all models; as for `mdn-train`."""
    implementation: Implementation | None = None
    """Of the momentum delta rule; "scan" and "xla" of the other rules too; None: the best ones."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of activations."""
    output: Path = Path("runs/throughput")
    """Directory of `results.jsonl`, `table.md` and `throughput.png`."""
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
    """Writes results as they come, then the table and the figure."""
    if config.smoke:
        config = dataclasses.replace(
            config, lengths=(16,), tokens=32, repeats=2, implementation="scan", dtype="float32"
        )
    device = jax.devices()[0].device_kind
    config.output.mkdir(parents=True, exist_ok=True)
    print(f"{device}, jax {jax.__version__}; {config.tokens:,} tokens a step, {config.dtype}")
    rows: list[Row] = []
    with (config.output / "results.jsonl").open("w") as file:
        for name in config.models:
            for length in config.lengths:
                row = _run(config, name, length)
                rows.append(row)
                values = {"device": device, "jax": jax.__version__, "dtype": config.dtype}
                file.write(json.dumps(row._asdict() | values | {"remat": config.remat}) + "\n")
                file.flush()
                print(f"{name}, {length:,}: {_speed(row, config.tokens)} tokens/s", flush=True)
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


def _run(config: ThroughputConfig, name: str, length: int) -> Row:
    from train.optimizer import make_optimizer, make_schedule
    from train.sections import OptimizerConfig
    from train.step import init_state, make_train_step, split_model

    model_fields = _model(config, name)
    model = MDNForCausalLM(
        model_fields,
        implementation=config.implementation,
        remat=config.remat,
        dtype=jnp.dtype(config.dtype),
        rngs=nnx.Rngs(0),
    )
    loss, params = split_model(model)
    del model
    recipe = OptimizerConfig(warmup_steps=1)
    schedule = make_schedule(recipe, 1000)
    optimizer = make_optimizer(recipe, schedule)
    state = init_state(params, optimizer)
    rows = config.tokens // length
    tokens = np.random.default_rng(0).integers(
        model_fields.vocab_size, size=(rows, length + 1), dtype=np.int32
    )
    batch: Any = jax.device_put(
        {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": np.zeros((rows, length), np.int32),
        }
    )
    began = time.perf_counter()
    seconds: list[float] = []
    try:
        build: Any = make_train_step(loss, optimizer, schedule, dtype=jnp.dtype(config.dtype))
        step = build.lower(state, batch).compile()
        compiled = time.perf_counter() - began
        for _ in range(2 + config.repeats):
            began = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - began)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Row(name, length, rows, [], time.perf_counter() - began, None)
    used = jax.devices()[0].memory_stats()
    peak = int(used["peak_bytes_in_use"]) if used else None
    return Row(name, length, rows, seconds[2:], compiled, peak)


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
