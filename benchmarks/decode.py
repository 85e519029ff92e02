"""`python -m benchmarks decode`: a few steps with states in place, in a compiled loop."""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from mdn_jax.ops.replay import fold, replay_state, replay_steps
from mdn_jax.ops.state import CompactState, ReplayState, StateDtype, full, keep
from mdn_jax.testing import LIMITS, Inputs, random_inputs, relative_errors
from pallas_kernels.momentum_delta import api as kernel_api
from pallas_kernels.tiling import DecodeTiles

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
    state_dtype: StateDtype = "float32"
    """Of the states between calls."""
    replay: int | None = None
    """Also times decoding that writes the states every so many steps: 2, 4, 8 or 16."""
    tiles: tuple[str, ...] = ()
    """Block of V and warps to try in the kernels, such as 64,8; none: those that ship."""
    runs: int = 20
    """Timed runs of the loop after the warm-up; the median is shown."""
    output: Path | None = None
    """Where to write the results as JSON."""

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= 16:
            raise ValueError(f"tokens: expected 1 to 16, got {self.tokens}")
        if self.replay is not None and (self.replay not in (2, 4, 8, 16) or self.tokens != 1):
            raise ValueError(
                f"replay: expected 2, 4, 8 or 16 with tokens = 1, got {self.replay} with "
                f"tokens = {self.tokens}"
            )
        if self.loop < 1 or self.runs < 2:
            raise ValueError(f"loop, runs: expected >= 1 and >= 2, got {self.loop}, {self.runs}")


class Row(NamedTuple):
    """One implementation at one shape.

    Attributes:
      name: of the implementation.
      shape: B,H,K,V.
      median: seconds a call.
      spread: between the quartiles, seconds a call.
      moved: bytes that a call has to read and write; with replay, on average.
      bandwidth: those, a second.
      error: largest relative error of outputs and states, after one call.
    """

    name: str
    shape: str
    median: float
    spread: float
    moved: float
    bandwidth: float
    error: float | None


State = MDNState | CompactState | ReplayState
Step = Callable[[Any], tuple[Array, Any]]


class Case(NamedTuple):
    """What is timed.

    Attributes:
      name: as in the table.
      step: a call.
      state: that it starts from.
      moved: bytes.
      errors: of its results, checked before it is timed; None for `COPY`.
    """

    name: str
    step: Step
    state: State
    moved: float
    errors: Callable[[], dict[str, float]] | None


def decode(config: Annotated[DecodeConfig, tyro.conf.arg(name="")]) -> None:
    """Times decoding; refuses to time an implementation that is wrong, and then fails."""
    on_cpu = jax.default_backend() == "cpu"
    implementations = config.implementations or (("xla",) if on_cpu else _IMPLEMENTATIONS)
    shapes = config.shapes or (_SMALL if on_cpu else _SHAPES)
    device = jax.devices()[0].device_kind
    print(
        f"{device}, jax {jax.__version__}, {config.dtype}, {config.tokens} token(s) a call, "
        f"{config.state_dtype} states; "
        f"median of {config.runs} runs of a compiled loop of {config.loop} calls; "
        "GB/s: states read and written once, with replay written every L calls"
    )
    rows: list[Row] = []
    refused: list[str] = []
    for shape in shapes:
        for tiles in config.tiles or (None,):
            with _with_tiles(tiles):
                more, why = _run_shape(config, shape, implementations)
            if tiles:
                more = [row._replace(name=f"{row.name}, tiles {tiles}") for row in more]
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


@contextmanager
def _with_tiles(tiles: str | None) -> Iterator[None]:
    """Within it the decode kernels have these tiles, "block of V,warps"."""
    chosen = kernel_api.decode_tiles
    if tiles is not None:
        one = DecodeTiles(*_numbers(tiles, 2, "tiles: expected block_v,warps such as 64,8"))
        kernel_api.decode_tiles = lambda *_: one
    try:
        yield
    finally:
        kernel_api.decode_tiles = chosen


def _run_shape(
    config: DecodeConfig, shape: str, implementations: Sequence[Implementation]
) -> tuple[list[Row], list[str]]:
    rows, refused = [], []
    for case in _cases(config, _parse(shape), implementations):
        try:
            error = _checked(config, case)
            median, spread = _time(config, case.step, case.state)
        except Exception as failure:  # of any kind: the other implementations still count
            kind = type(failure).__name__
            refused.append(f"{case.name} at {shape} is not timed: {kind}: {failure}")
            continue
        rows.append(Row(case.name, shape, median, spread, case.moved, case.moved / median, error))
    return rows, refused


def _cases(
    config: DecodeConfig, sizes: tuple[int, ...], implementations: Sequence[Implementation]
) -> Iterator[Case]:
    inputs = _inputs(config, sizes, config.tokens)
    state = keep(inputs.pop("initial_state"), config.state_dtype)
    with jax.default_matmul_precision("highest"):
        expected = momentum_delta_rule(
            **widen(inputs), initial_state=full(state), implementation="scan"
        )
    size = sum(x.nbytes for x in jax.tree.leaves(state))

    def rule(state: MDNState | CompactState, implementation: Implementation) -> tuple[Array, Any]:
        return momentum_delta_rule(**inputs, initial_state=state, implementation=implementation)

    def in_full(outputs: tuple[Array, Any]) -> tuple[Array, MDNState]:
        return outputs[0], full(outputs[1])

    for name in implementations:
        step = partial(rule, implementation=name)
        errors = partial(_errors, in_full, jax.jit(step), state, expected)
        yield Case(name, step, state, 2 * size, errors)
    if config.replay is not None:
        yield from _replays(config, sizes, implementations, state)

    def add(state: State) -> tuple[Array, Any]:
        return jnp.zeros_like(inputs["v"]), jax.tree.map(lambda x: x + x.dtype.type(1e-6), state)

    yield Case(COPY, add, state, 2 * size, None)


def _replays(
    config: DecodeConfig,
    sizes: tuple[int, ...],
    implementations: Sequence[Implementation],
    state: MDNState | CompactState,
) -> Iterator[Case]:
    """Checked over the steps in which the states are written twice."""
    assert config.replay is not None
    inputs = _inputs(config, sizes, 4 * config.replay)
    del inputs["initial_state"]
    with jax.default_matmul_precision("highest"):
        expected = momentum_delta_rule(
            **widen(inputs), initial_state=full(state), implementation="scan"
        )
    start = replay_state(state, config.replay, dtype=config.dtype)
    one: Inputs = {name: x[:, :1] for name, x in inputs.items()}
    size, ring = (sum(x.nbytes for x in jax.tree.leaves(y)) for y in (state, start[1:]))
    # the steps that are kept, of 2L slots; read and written once more where the oldest are applied
    moved = size * (1 + 2 / config.replay) + ring * (1.5 - 0.5 / config.replay) / 2

    def steps(inputs: Inputs, state: ReplayState, name: Any) -> tuple[Array, ReplayState]:
        return replay_steps(**inputs, initial_state=state, implementation=name)

    def folded(outputs: tuple[Array, ReplayState]) -> tuple[Array, MDNState]:
        return outputs[0], full(fold(outputs[1]))

    for name in implementations:
        if name != "triton":
            run = jax.jit(partial(steps, inputs, name=name))
            errors = partial(_errors, folded, run, start, expected)
            step = partial(steps, one, name=name)
            yield Case(f"{name}, replay {config.replay}", step, start, moved, errors)


def _errors(
    results: Callable[[Any], tuple[Array, MDNState]], run: Step, state: State, expected: Any
) -> dict[str, float]:
    return relative_errors(results(run(state)), expected)


def _checked(config: DecodeConfig, case: Case) -> float | None:
    """The largest error.

    Raises:
      ValueError: it is above the limit: of outputs, and of the rounding of states.
    """
    if case.errors is None:
        return None
    limit = LIMITS[config.dtype].outputs
    if config.state_dtype != "float32":
        kept = "float16" if config.state_dtype == "float16_scaled" else config.state_dtype
        limit = max(limit, float(jnp.finfo(kept).eps))
    error = max(case.errors().values())
    if not error <= limit:
        raise ValueError(f"relative error {error:.1e} is above {limit:.0e}")
    return error


def _inputs(config: DecodeConfig, sizes: tuple[int, ...], length: int) -> Inputs:
    batch, heads, key_dim, value_dim = sizes
    return random_inputs(
        seed=0,
        batch=batch,
        length=length,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=config.dtype,
    )


def _parse(shape: str) -> tuple[int, ...]:
    return _numbers(shape, 4, "shapes: expected B,H,K,V such as 64,6,128,256")


def _numbers(text: str, count: int, expected: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != count or not all(part.strip().isdecimal() for part in parts):
        raise SystemExit(f"{expected}: {text}")
    return tuple(map(int, parts))


def _time(config: DecodeConfig, step: Step, state: State) -> tuple[float, float]:
    """Median and distance of the quartiles, seconds a call."""

    @partial(jax.jit, donate_argnums=0)
    def run(state: State) -> tuple[Array, Any]:
        def again(_: Any, carry: tuple[Array, State]) -> tuple[Array, Any]:
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
            f"{row.moved / 1e6:.1f}",
            f"{row.bandwidth / 1e9:.0f}",
            f"{row.bandwidth / peak.bandwidth:.0%}" if peak else "-",
            f"{row.median / copies[row.shape]:.2f}" if row.shape in copies else "-",
            "-" if row.error is None else f"{row.error:.1e}",
        ]
        for row in rows
    ]
    headers = ["B,H,K,V", "", "ms a call", "MB", "GB/s", "of peak", "x copy", "error"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
