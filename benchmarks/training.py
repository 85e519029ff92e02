"""`python -m benchmarks training`: the whole training step, and its parts by themselves."""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from tabulate import tabulate

from benchmarks.part_costs import part_costs
from benchmarks.parts import Shapes, time_parts
from benchmarks.timing import model_for_device
from configs import CONFIGS
from mdn_jax.models.remat import Remat
from mdn_jax.ops.api import Implementation
from train.config_sections import Autotune

WARM_UP = 3
DOCUMENT = 1024  # mean length, tokens
TRACED_STEPS = 3


@dataclass(frozen=True)
class TrainingConfig:
    """Times training steps on random tokens; parameters, optimizer and step are those of a run."""

    model: str | None = None
    """Name of a configuration, as for `python -m train`; None: mdn_400m, on a CPU smoke."""
    rows: int | None = None
    """Rows of a micro-batch on each device; None: the configuration's."""
    accumulation: int = 1
    """Micro-batches in a step."""
    sequence_length: int | None = None
    """Tokens in a row; None: the configuration's."""
    remat: Remat | None = None
    """What is computed again in the backward pass; None: the configuration's."""
    scan_layers: bool = False
    """Scan over the layers."""
    autotune: Autotune | None = None
    """Which algorithms of products the step times first; None: the configuration's."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the computation; None: the configuration's."""
    implementation: Implementation | None = None
    """Of the momentum delta rule; None: the best one."""
    steps: int = 20
    """Steps to time."""
    parts: bool = True
    """Time the parts of the step by themselves too."""
    trace: Path | None = None
    """Directory to write a profile of a few more steps to."""
    output: Path | None = None
    """Where to write the results as JSON."""

    def __post_init__(self) -> None:
        if self.model is not None and self.model not in CONFIGS:
            raise ValueError(f"model: expected one of {', '.join(CONFIGS)}, got {self.model!r}")
        for name, least in (("rows", 1), ("accumulation", 1), ("sequence_length", 2), ("steps", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")


class Whole(NamedTuple):
    """The whole step.

    Attributes:
      seconds: of a step, mean of those timed, as the tokens a second of a run.
      spread: seconds between the first and third quartile of the single steps.
      tokens: in a step, over all devices.
      trace: seconds to trace and lower the step.
      compile: seconds to compile it.
      first: seconds from the start of tracing to the end of the first step.
      process: seconds from the start of the process to the end of the first step; None where the
        system does not tell.
      peak: most bytes in use on the first device; None where it does not count.
      planned: bytes of arguments and temporaries as the compiler plans them; 0 where it does not.
      flops: that the model asks for in a step, see `train.metrics.flops`.
      parameters: of the model.
      loss: of the last step, nats.
    """

    seconds: float
    spread: float
    tokens: int
    trace: float
    compile: float
    first: float
    process: float | None
    peak: int | None
    planned: int
    flops: float
    parameters: int
    loss: float


def training(config: Annotated[TrainingConfig, tyro.conf.arg(name="")]) -> None:
    """Times the whole step of a configuration, and its parts by themselves."""
    # the default leaves a quarter of the device unused; read when jax first asks for devices
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    from train.metrics.flops import utilisation

    devices = jax.devices()
    kind = devices[0].device_kind
    run = _Run(config)
    print(
        f"{len(devices)} x {kind}, jax {jax.__version__}, {run.name}, {run.base.dtype}, "
        f"remat {run.base.remat}, {run.base.batch_size} rows of {run.base.sequence_length:,} "
        f"tokens in {config.accumulation} micro-batch(es)"
    )
    whole, update = run.time()
    speed = whole.tokens / whole.seconds
    mfu = utilisation(whole.flops / whole.seconds, kind, len(devices))
    lines = [
        ("parameters", f"{whole.parameters:,}"),
        ("step, ms", f"{whole.seconds * 1e3:.2f} ± {whole.spread * 5e2:.2f}"),
        ("tokens/s", f"{speed:,.0f}"),
        ("model TFLOP/s", f"{whole.flops / whole.seconds / 1e12:.1f}"),
        ("MFU", f"{mfu:.1%}" if mfu else "-"),
        ("peak memory, GB", f"{whole.peak / 1e9:.2f}" if whole.peak else "-"),
        ("planned memory, GB", f"{whole.planned / 1e9:.2f}" if whole.planned else "-"),
        ("trace and lower, s", f"{whole.trace:.1f}"),
        ("compile, s", f"{whole.compile:.1f}"),
        ("first step with both, s", f"{whole.first:.1f}"),
        ("process start to first step, s", f"{whole.process:.1f}" if whole.process else "-"),
        ("loss after the last step, nats", f"{whole.loss:.3f}"),
    ]
    print(f"mean of {config.steps} steps after {WARM_UP} more, each dispatched during the last")
    print(tabulate(lines, tablefmt="github", disable_numparse=True), flush=True)
    parts, floors = dict[str, float](), dict[str, float]()
    if config.parts:
        parts = run.time_parts() | {"optimizer": update}
        floors = run.floors(kind, whole.parameters)
        print(_parts_table(parts, whole.seconds, floors))
    if config.output:
        report = {
            "device": kind,
            "devices": len(devices),
            "jax": jax.__version__,
            "config": dataclasses.asdict(config),
            "tokens_per_second": speed,
            "mfu": mfu,
            "whole": whole._asdict(),
            "parts": parts,
            "floors": floors,
        }
        config.output.write_text(json.dumps(report, indent=1, default=str))


def _parts_table(parts: dict[str, float], whole: float, floors: dict[str, float]) -> str:
    total = sum(parts.values())
    rows = [*parts.items(), ("sum of the parts", total), ("rest", whole - total), ("step", whole)]
    if set(floors) >= set(parts):
        floors = floors | {"sum of the parts": sum(floors[name] for name in parts)}
    lines = [
        [
            name,
            f"{x * 1e3:.2f}",
            f"{x / whole:.1%}",
            f"{floors[name] * 1e3:.2f}" if name in floors else "-",
            f"{x / floors[name]:.2f}" if name in floors else "-",
        ]
        for name, x in rows
    ]
    headers = ["part, by itself", "ms a step", "of the step", "floor ms", "x floor"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


class _Run:
    """The step of a configuration on all devices."""

    def __init__(self, config: TrainingConfig) -> None:
        self.name = config.model or model_for_device()
        base = CONFIGS[self.name]()
        rows = config.rows or base.batch_size // base.accumulation
        self.config = config
        self.base = dataclasses.replace(
            base,
            batch_size=rows * config.accumulation * len(jax.devices()),
            accumulation=config.accumulation,
            sequence_length=config.sequence_length or base.sequence_length,
            remat=config.remat or base.remat,
            autotune=config.autotune or base.autotune,
            scan_layers=config.scan_layers,
            dtype=config.dtype or base.dtype,
            implementation=config.implementation,
        )

    def time(self) -> tuple[Whole, float]:
        """The whole step, and seconds of the optimizer's part of it by itself."""
        # not in the extra `benchmarks`: packages that only training needs
        from benchmarks.whole_step import WholeStep
        from train.metrics.flops import flops_per_token
        from train.step import make_update, rounded

        base, dtype = self.base, jnp.dtype(self.base.dtype)
        step = WholeStep(base, document=DOCUMENT)
        state, batch = step.initial_state(), step.batch
        began = time.perf_counter()
        lowered = step.lower()
        trace = time.perf_counter() - began
        compiled = lowered.compile()
        compile_seconds = time.perf_counter() - began - trace
        state, metrics = jax.block_until_ready(compiled(state, batch))
        first, process = time.perf_counter() - began, _process_seconds()

        plan = compiled.memory_analysis()
        planned = plan.argument_size_in_bytes + plan.temp_size_in_bytes if plan else 0
        state, metrics, times = time_steps(compiled, state, batch, steps=self.config.steps)
        low, _, high = statistics.quantiles(times, n=4)
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        if self.config.trace:
            with jax.profiler.trace(str(self.config.trace)):
                state, metrics, traced = time_steps(
                    compiled, state, batch, steps=TRACED_STEPS, warm_up=0
                )
            speed = base.tokens_per_step / statistics.mean(traced)
            print(f"{TRACED_STEPS} steps in the trace: {speed:,.0f} tokens/s")
        tokens = base.tokens_per_step
        whole = Whole(
            seconds=statistics.mean(times),
            spread=high - low,
            tokens=tokens,
            trace=trace,
            compile=compile_seconds,
            first=first,
            process=process,
            peak=peak,
            planned=planned,
            flops=tokens * flops_per_token(base.model, step.like_params, base.sequence_length),
            parameters=sum(x.size for x in jax.tree.leaves(step.like.params)),
            loss=float(metrics.loss),
        )
        del compiled, metrics
        gradient = jax.jit(
            partial(rounded, dtype=dtype) if base.accumulation == 1 else lambda params: params
        )(state.params)
        wide = partial(jax.tree.map, lambda g, x: g.astype(x.dtype))
        update = jax.jit(
            lambda state, gradient: make_update(
                step.optimizer, step.schedule, base.guard, step.frozen
            )(state, jnp.ones(()), wide(gradient, state.params)),
            donate_argnums=0,
        )
        _, _, times = time_steps(update, state, gradient, steps=self.config.steps)
        return whole, statistics.mean(times)

    def floors(self, device_kind: str, parameters: int) -> dict[str, float]:
        """Seconds that no part can beat on a device that is known, by `benchmarks.costs`."""
        base, dtype = self.base, jnp.dtype(self.base.dtype)
        costs = part_costs(
            base.model,
            parameters,
            rows=base.batch_size // base.accumulation // len(jax.devices()),
            length=base.sequence_length,
            dtype=dtype,
            accumulation=base.accumulation,
        )
        floors = {name: cost.floor(device_kind, dtype) for name, cost in costs.items()}
        return {name: seconds for name, seconds in floors.items() if seconds is not None}

    def time_parts(self) -> dict[str, float]:
        """Seconds of the parts of one step on one device, the optimizer apart."""
        from benchmarks.whole_step import random_batch

        base = self.base
        rows = base.batch_size // base.accumulation // len(jax.devices())
        dtype = jnp.dtype(base.dtype)
        shapes = Shapes(base.model, rows, base.sequence_length, dtype, base.implementation)
        documents = jnp.asarray(random_batch(base, DOCUMENT)["segment_ids"][:rows])
        seconds = time_parts(shapes, documents, runs=max(self.config.steps // 4, 2))
        return {name: base.accumulation * x for name, x in seconds.items()}


def time_steps(
    run: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    other: Any,
    *,
    steps: int,
    warm_up: int = WARM_UP,
) -> tuple[Any, Any, list[float]]:
    """The state and the metrics after the steps, and the seconds of each after the warm-up.

    As a run has them: each is dispatched before the one before it has ended. The first that counts
    begins when nothing is left to do. For to dispatch a step takes the host most of the step before
    it: so late it would see the last warm-up step end, and so much too short the mean would be.
    """
    from train.metrics.steps import Pace

    pace, times, pending = Pace(1), list[float](), None
    for i in range(warm_up + steps):
        if i == warm_up:
            jax.block_until_ready((state, pending))
            pending = None
            times.clear()
            pace.start()
        state, metrics = run(state, other)
        if pending is not None:
            jax.block_until_ready(pending)
            times.append(pace.ended())
        pending = metrics
    jax.block_until_ready((state, pending))
    times.append(pace.ended())
    return state, pending, times


def _process_seconds() -> float | None:
    """Since the start of this process (Linux)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return None
    return uptime - ticks / os.sysconf("SC_CLK_TCK")
