"""`python -m benchmarks decode`: a few steps with states in place, in a compiled loop."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jax import lax
from jaxtyping import Array
from tabulate import tabulate

from benchmarks.costs import PEAKS
from benchmarks.reference import widen
from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.ops.api import Implementation
from mdn_jax.testing import LIMITS, Inputs, random_inputs, relative_errors

COPY = "copy"


_SHAPES = ("1,6,128,256", "8,6,128,256", "64,6,128,256")
_SMALL = ("1,2,64,64",)
_IMPLEMENTATIONS: tuple[Implementation, ...] = ("pallas_triton", "triton", "xla")


@dataclass(frozen=True)
class DecodeConfig:
    """Times decoding by the operator: the same few steps again and again, on states in place."""

    shapes: tuple[str, ...] | None = None
    """B,H,K,V of each; None: 1, 8 and 64 rows of 6,128,256, on a CPU one of 2,64,64."""
    tokens: int = 1
    """Steps in a call, 1 to 16."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of q, k, v."""
    implementations: tuple[Implementation, ...] | None = None
    """What to time; None: pallas_triton, triton and xla, on a CPU xla."""
    loop: int = 256
    """Calls in one compiled loop."""
    runs: int = 20
    """Timed runs of the loop after the warm-up; the median is shown."""
    output: Path | None = None
    """Where to write the results as JSON."""

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= 16:
            raise ValueError(f"tokens: expected 1 to 16, got {self.tokens}")
        if self.loop < 1 or self.runs < 2:
            raise ValueError(f"loop, runs: expected >= 1 and >= 2, got {self.loop}, {self.runs}")


class Row(NamedTuple):
    """One implementation at one shape.

    Attributes:
      name: of the implementation.
      shape: B,H,K,V.
      median: seconds a call.
      spread: between the quartiles, seconds a call.
      bandwidth: bytes of state read and written, a second.
      error: largest relative error of outputs and states, after one call.
    """

    name: str
    shape: str
    median: float
    spread: float
    bandwidth: float
    error: float | None


Step = Callable[[MDNState], tuple[Array, MDNState]]


def decode(config: Annotated[DecodeConfig, tyro.conf.arg(name="")]) -> None:
    """Times decoding; refuses to time an implementation that is wrong, and then fails."""
    on_cpu = jax.default_backend() == "cpu"
    implementations = config.implementations or (("xla",) if on_cpu else _IMPLEMENTATIONS)
    shapes = config.shapes or (_SMALL if on_cpu else _SHAPES)
    device = jax.devices()[0].device_kind
    print(
        f"{device}, jax {jax.__version__}, {config.dtype}, {config.tokens} token(s) a call; "
        f"median of {config.runs} runs of a compiled loop of {config.loop} calls; "
        "GB/s: states read and written once"
    )
    rows: list[Row] = []
    refused: list[str] = []
    for shape in shapes:
        more, why = _run_shape(config, shape, implementations)
        rows, refused = rows + more, refused + why
    print(table(rows, device))
    print(*refused, sep="\n", end="\n" if refused else "")
    if config.output:
        report = {
            "device": device,
            "jax": jax.__version__,
            "config": asdict(config),
            "not_timed": refused,
            "results": [row._asdict() for row in rows],
        }
        config.output.write_text(json.dumps(report, indent=1, default=str))
    if refused:
        raise SystemExit(1)


def _run_shape(
    config: DecodeConfig, shape: str, implementations: Sequence[Implementation]
) -> tuple[list[Row], list[str]]:
    batch, heads, key_dim, value_dim = _parse(shape)
    inputs: Inputs = random_inputs(
        seed=0,
        batch=batch,
        length=config.tokens,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=config.dtype,
    )
    state = inputs.pop("initial_state")
    with jax.default_matmul_precision("highest"):
        expected = momentum_delta_rule(**widen(inputs), initial_state=state, implementation="scan")
    moved = 2 * sum(x.nbytes for x in jax.tree.leaves(state))

    def rule(state: MDNState, implementation: Implementation) -> tuple[Array, MDNState]:
        return momentum_delta_rule(**inputs, initial_state=state, implementation=implementation)

    def add(state: MDNState) -> tuple[Array, MDNState]:
        return jnp.zeros_like(inputs["v"]), jax.tree.map(lambda x: x + 1e-6, state)

    steps: dict[str, Step] = {name: partial(rule, implementation=name) for name in implementations}
    rows, refused = [], []
    for name, step in (steps | {COPY: add}).items():
        try:
            error = None
            if name != COPY:
                error = max(relative_errors(jax.jit(step)(state), expected).values())
                limit = LIMITS[config.dtype].outputs
                if not error <= limit:
                    raise ValueError(f"relative error {error:.1e} is above {limit:.0e}")
            median, spread = _time(config, step, state)
        except Exception as failure:  # of any kind: the other implementations still count
            kind = type(failure).__name__
            refused.append(f"{name} at {shape} is not timed: {kind}: {failure}")
            continue
        rows.append(Row(name, shape, median, spread, moved / median, error))
    return rows, refused


def _parse(shape: str) -> tuple[int, ...]:
    try:
        batch, heads, key_dim, value_dim = (int(part) for part in shape.split(","))
    except ValueError as error:
        raise SystemExit(f"shapes: expected B,H,K,V such as 64,6,128,256: {shape}") from error
    return batch, heads, key_dim, value_dim


def _time(config: DecodeConfig, step: Step, state: MDNState) -> tuple[float, float]:
    """Median and distance of the quartiles, seconds a call."""

    @partial(jax.jit, donate_argnums=0)
    def run(state: MDNState) -> tuple[Array, MDNState]:
        def again(_: Any, carry: tuple[Array, MDNState]) -> tuple[Array, MDNState]:
            return step(carry[1])

        o, _ = jax.eval_shape(step, state)
        return lax.fori_loop(0, config.loop, again, (jnp.zeros(o.shape, o.dtype), state))

    state = jax.tree.map(jnp.copy, state)  # donated
    times = []
    for _ in range(config.runs + 2):
        start = time.perf_counter()
        _, state = jax.block_until_ready(run(state))
        times.append((time.perf_counter() - start) / config.loop)
    low, median, high = statistics.quantiles(times[2:], n=4)
    return median, high - low


def table(rows: list[Row], device: str) -> str:
    """One row an implementation and shape; `copy` adds a constant to both states."""
    peak = PEAKS.get(device)
    copies = {row.shape: row.median for row in rows if row.name == COPY}
    lines = [
        [
            row.shape,
            row.name,
            f"{row.median * 1e3:.4f} ± {row.spread * 5e2:.4f}",
            f"{row.bandwidth / 1e9:.0f}",
            f"{row.bandwidth / peak.bandwidth:.0%}" if peak else "-",
            f"{row.median / copies[row.shape]:.2f}" if row.shape in copies else "-",
            "-" if row.error is None else f"{row.error:.1e}",
        ]
        for row in rows
    ]
    headers = ["B,H,K,V", "", "ms a call", "GB/s", "of peak", "x copy", "error"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
