"""`python -m benchmarks two_devices`: training steps on meshes of several devices, beside one."""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import jax
import numpy as np
import tyro
from tabulate import tabulate

from benchmarks.collectives import collectives, summary
from benchmarks.timing import model_for_device
from benchmarks.training import DOCUMENT, TRACED_STEPS, time_steps
from configs import CONFIGS
from mdn_jax.compiled import compiled_once
from mdn_jax.models.remat import Remat
from mdn_jax.ops.api import Implementation

Part = Literal["data", "fsdp", "tensor", "context", "long"]
AXES: tuple[Part, ...] = ("data", "fsdp", "tensor", "context")
SAME_LOSS = 0.01
"""Most that losses of the same batch differ, relative: of bfloat16 summed in another order."""


@dataclass(frozen=True)
class TwoDevicesConfig:
    """Times training steps on meshes that cut one axis over several devices, beside one device.

    All in one process. Every device has as many tokens as the one has; a row of `long_row` tokens
    is the same work on one and on several.
    """

    model: str | None = None
    """Name of a configuration, as for `python -m train`; None: mdn_400m, on a CPU smoke."""
    devices: int = 2
    """Of a mesh; 1 tries the command out."""
    only: tuple[Part, ...] = get_args(Part)
    """Axes of the mesh, and "long": one device and `context` with rows of `long_row` tokens."""
    rows: int | None = None
    """Rows of a micro-batch on the one device; None: the configuration's."""
    accumulation: int = 2
    """Micro-batches in a step."""
    sequence_length: int | None = None
    """Tokens in a row; None: the configuration's."""
    long_row: int = 131_072
    """Tokens of a long row; one in a micro-batch."""
    remat: Remat | None = None
    """What is computed again in the backward pass; None: the configuration's."""
    long_remat: Remat = "states"
    """The same, of long rows."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the computation; None: the configuration's."""
    implementation: Implementation | None = None
    """Of the momentum delta rule; None: the best one."""
    options: tuple[str, ...] = ()
    """Options of XLA, each "name=value" or several with commas between; every mesh is timed with
    each of these as well."""
    steps: int = 8
    """Steps to time."""
    threads: int = min(8, os.cpu_count() or 1)
    """Steps that compile at once."""
    trace: Path | None = None
    """Directory to write a profile of a few more steps of every mesh to."""
    compiled: Path | None = None
    """Directory of compiled programs for the next process; None: mdn-jax in the user's cache."""
    text: Path | None = None
    """Directory to write the compiled programs' text to."""
    output: Path | None = None
    """Where to write the results as JSON."""

    def __post_init__(self) -> None:
        if self.model is not None and self.model not in CONFIGS:
            raise ValueError(f"model: expected one of {', '.join(CONFIGS)}, got {self.model!r}")
        for name, least in (("devices", 1), ("accumulation", 1), ("steps", 2), ("threads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected an int >= {least}, got {getattr(self, name)!r}")
        for each in self.options:
            compiler_options(each)


class Case(NamedTuple):
    """A step to time.

    Attributes:
      axis: of the mesh; None: one device.
      long: whether with rows of `long_row` tokens.
      options: of XLA.
    """

    axis: str | None
    long: bool
    options: str = ""

    @property
    def name(self) -> str:
        """For the table."""
        row = "long row, " if self.long else ""
        return f"{row}{self.axis or 'one device'}" + (f", {self.options}" if self.options else "")


class Measured(NamedTuple):
    """What was measured.

    Attributes:
      tokens: in a step.
      seconds: of a step, those of all that were timed together; None where it did not fit into the
        memory.
      planned: bytes of arguments and temporaries on a device, as the compiler plans them.
      peak: most bytes in use on the first device so far in the process, if it counts.
      loss: of the first step, nats.
      compile: seconds to compile.
      collectives: by kind, how many a step and their bytes.
    """

    tokens: int
    seconds: float | None
    planned: int
    peak: int | None
    loss: float
    compile: float
    collectives: dict[str, dict[str, float]]


def compiler_options(text: str) -> dict[str, Any]:
    """`name=value,name=value` as a dictionary.

    Raises:
      ValueError: not of this form.
    """
    pairs = [x.partition("=") for x in text.split(",")] if text else []
    if not all(name and mark and value for name, mark, value in pairs):
        raise ValueError(f"options: expected name=value with commas between, got {text!r}")
    return {name: _typed(value) for name, _, value in pairs}


def _typed(value: str) -> bool | int | str:
    if value in ("true", "false"):
        return value == "true"
    return int(value) if value.lstrip("-").isdigit() else value


def two_devices(config: Annotated[TwoDevicesConfig, tyro.conf.arg(name="")]) -> None:
    """Times the steps; refuses those whose loss is not that of the others."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    if jax.device_count() < config.devices:
        raise SystemExit(
            f"devices: expected at most {jax.device_count()}, those of this process, "
            f"got {config.devices}"
        )
    name = config.model or model_for_device()
    print(
        f"{config.devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}, {name}; "
        f"mean of {config.steps} steps, each dispatched during the last",
        flush=True,
    )
    with compiled_once(config.compiled):
        results = _all(config, name)
    print(_table(results))
    if config.output:
        record = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "config": dataclasses.asdict(config),
            "results": [
                {**case._asdict(), "name": case.name, "ratio": _ratio(results, case)} | x._asdict()
                for case, x in results.items()
            ],
        }
        config.output.write_text(json.dumps(record, indent=1, default=str))


def _cases(config: TwoDevicesConfig) -> list[Case]:
    """One device before those that are compared with it; what needs most memory comes last."""
    variants = ["", *config.options]
    axes = [axis for axis in AXES if axis in config.only]
    cases = [Case(None, False)] if axes else []
    cases += [Case(axis, False, options) for axis in axes for options in variants]
    if "long" in config.only:
        cases += [Case("context", True, options) for options in variants]
        cases.append(Case(None, True))
    return cases


def _all(config: TwoDevicesConfig, name: str) -> dict[Case, Measured]:
    cases = _cases(config)
    results, losses = dict[Case, Measured](), dict[tuple[bool, int], float]()
    # all programs are there before the first is timed
    with ThreadPoolExecutor(config.threads) as pool:
        steps = [_step(config, name, case) for case in cases]
        ready: list[Future[Any]] = [
            pool.submit(_compiled, case, step) for case, step in zip(cases, steps, strict=True)
        ]
    state = jax.device_get(steps[0].initial_state())
    for case, step, future in zip(cases, steps, ready, strict=True):
        results[case] = x = _timed(config, case, step, state, *future.result())
        print(_line(case, x, None), flush=True)
        of_batch = case.long, x.tokens
        expected = losses.setdefault(of_batch, x.loss)
        if x.seconds is None:
            losses.pop(of_batch)
        elif not abs(x.loss - expected) <= SAME_LOSS * abs(expected):
            raise SystemExit(f"{case.name}: loss {x.loss} of a batch that had {expected}")
    return results


def _step(config: TwoDevicesConfig, name: str, case: Case) -> Any:
    """A `WholeStep`."""
    # not in the extra `benchmarks`: packages that only training needs
    from benchmarks.whole_step import WholeStep
    from train.config_sections import MeshConfig

    base = CONFIGS[name]()
    rows = 1 if case.long else config.rows or base.batch_size // base.accumulation
    count = 1 if case.axis is None else config.devices
    if not case.long:  # as many tokens on each
        rows *= count
    sizes = dict.fromkeys(AXES, 1) | ({case.axis: count} if case.axis else {})
    length = config.sequence_length or base.sequence_length
    return WholeStep(
        dataclasses.replace(
            base,
            batch_size=rows * config.accumulation,
            accumulation=config.accumulation,
            sequence_length=config.long_row if case.long else length,
            remat=config.long_remat if case.long else config.remat or base.remat,
            dtype=config.dtype or base.dtype,
            implementation=config.implementation,
            mesh=MeshConfig(**sizes),
        ),
        document=DOCUMENT,
        devices=jax.devices()[:count],
    )


def _compiled(case: Case, step: Any) -> tuple[Any, float]:
    """The step, and the seconds to trace and compile it."""
    began = time.perf_counter()
    compiled = step.lower().compile(compiler_options=compiler_options(case.options))
    return compiled, time.perf_counter() - began


def _timed(
    config: TwoDevicesConfig, case: Case, step: Any, state: Any, compiled: Any, seconds: float
) -> Measured:
    text = compiled.as_text()
    if config.text:
        config.text.mkdir(parents=True, exist_ok=True)
        (config.text / f"{case.name.replace(' ', '-')}.hlo").write_text(text)
    plan = compiled.memory_analysis()
    planned = plan.argument_size_in_bytes + plan.temp_size_in_bytes if plan else 0
    sent = summary(collectives(text))
    tokens = step.config.tokens_per_step
    try:
        placed = jax.tree.map(
            lambda x, y: jax.device_put(np.asarray(x), y.sharding), state, step.like
        )
        placed, metrics = compiled(placed, step.batch)
        loss = float(metrics.loss)
        placed, _, times = time_steps(compiled, placed, step.batch, steps=config.steps)
        if config.trace:
            with jax.profiler.trace(str(config.trace / case.name.replace(" ", "-"))):
                time_steps(compiled, placed, step.batch, steps=TRACED_STEPS, warm_up=0)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Measured(tokens, None, planned, None, float("nan"), seconds, sent)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    mean = statistics.mean(times)
    return Measured(tokens, mean, planned, peak, loss, seconds, sent)


def _ratio(results: Mapping[Case, Measured], case: Case) -> float | None:
    """Tokens a second, by those of one device."""
    x, one = results[case], results.get(Case(None, case.long))
    if one is None or x.seconds is None or one.seconds is None:
        return None
    return x.tokens / x.seconds / (one.tokens / one.seconds)


def _line(case: Case, x: Measured, ratio: float | None) -> list[str]:
    def sent(what: str) -> str:
        return " + ".join(
            f"{kind} {of[what] / 1e6:,.0f}" if what == "bytes" else f"{of[what]:.0f}"
            for kind, of in x.collectives.items()
        )

    times = sum(of["times"] for of in x.collectives.values())
    waited = sum(of["waited for"] for of in x.collectives.values())
    return [
        case.name,
        f"{x.seconds * 1e3:.1f}" if x.seconds else "out of memory",
        f"{x.tokens / x.seconds:,.0f}" if x.seconds else "-",
        f"{ratio:.3f}" if ratio else "-",
        f"{x.planned / 1e9:.2f}",
        f"{x.peak / 1e9:.2f}" if x.peak else "-",
        f"{x.loss:.3f}",
        f"{times:.0f}",
        f"{waited:.0f}",
        sent("bytes") or "-",
        f"{x.compile:.0f}",
    ]


_HEADERS = ["mesh", "step ms", "tokens/s", "times one", "planned GB", "peak GB so far", "loss"]
_HEADERS += ["collectives", "waited for", "their MB a step", "compile s"]


def _table(results: Mapping[Case, Measured]) -> str:
    lines = [_line(case, x, _ratio(results, case)) for case, x in results.items()]
    return tabulate(lines, headers=_HEADERS, tablefmt="github", disable_numparse=True)
