"""The short convolutions of queries, keys and values: the kernels beside XLA's code."""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import Array
from tabulate import tabulate

from benchmarks.costs import Cost
from benchmarks.timing import Timing, compile_for, how_timed, measure_compiled, milliseconds
from mdn_jax.ops.short_convolution import xla_convolution
from mdn_jax.testing import relative_errors
from pallas_kernels.offline_compile import compile_kernel, lowered
from pallas_kernels.short_convolution import Branch, Tiles, short_convolution

LIMITS = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-4}
"""Of the relative error of any output or gradient, against XLA's code in float32."""


@dataclass(frozen=True)
class ConvolutionConfig:
    """Times the convolutions of one layer, forward and with the backward pass."""

    shapes: tuple[str, ...] = ("8,4096,768,768,1536", "4,4096,1536,1536,3072")
    """B,T and the width of each branch: q, k and v of the published 400M and 1.3B models."""
    taps: int = 4
    """Of each convolution."""
    bias: bool = False
    """With one."""
    document: int = 512
    """Steps of a document; 0: one document a row."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of inputs and outputs; parameters are rounded to it, as a training step does."""
    tiles: tuple[str, ...] = ()
    """Others than those that ship: strips,steps,channels,unroll,warps, such as 4,64,128,8,4."""
    runs: int = 20
    """Timed groups of calls after the warm-up; the median is shown."""
    inspect: bool = False
    """Without a GPU: registers, spills and shared memory for capability 9.0 (extra `triton`)."""
    interpret: bool = False
    """In the interpreter, on any device: says that the command works, not how long kernels take."""
    output: Path | None = None
    """Where to write the results as JSON."""


class Row(NamedTuple):
    """One implementation at one shape.

    Attributes:
      name: "xla", or the kernels with their tiles.
      shape: B,T and widths.
      passes: "forward" or "both".
      cost: bytes of inputs and outputs, gradients included.
      timing: measured.
      error: largest relative error of outputs and gradients.
    """

    name: str
    shape: str
    passes: str
    cost: Cost
    timing: Timing
    error: float


def convolution(config: Annotated[ConvolutionConfig, tyro.conf.arg(name="")]) -> None:
    """Times the convolutions; refuses to time kernels that are wrong."""
    tiles = [
        Tiles(),
        *(Tiles(*_integers("tiles", x, ",".join(Tiles._fields))) for x in config.tiles),
    ]
    shapes = {x: _integers("shapes", x, "B,T,width,...") for x in config.shapes}
    if config.inspect:
        _inspect(config, shapes, tiles)
        return
    if jax.default_backend() != "gpu" and not config.interpret:
        raise SystemExit("a CUDA GPU is needed; --inspect and --interpret run anywhere")
    device = jax.devices()[0].device_kind
    print(
        f"{device}, jax {jax.__version__}, {config.dtype}, {config.taps} taps, bias {config.bias}"
    )
    print(f"documents of {config.document} steps; {how_timed(config.runs)}")
    rows = [row for name, sizes in shapes.items() for row in _of_shape(config, name, sizes, tiles)]
    print(table(rows, device, config.dtype))
    if config.output:
        results = [row._asdict() | {"timing": asdict(row.timing)} for row in rows]
        record = {"device": device, "jax": jax.__version__, "config": asdict(config)}
        config.output.write_text(json.dumps(record | {"results": results}, indent=1, default=str))


def _integers(option: str, text: str, names: str) -> tuple[int, ...]:
    numbers, count = text.split(","), names.count(",") + 1
    fits = len(numbers) == count or (names.endswith("...") and len(numbers) > count - 2)
    if not fits or not all(x.isdigit() and int(x) > 0 for x in numbers):
        raise SystemExit(f"{option}: expected positive integers {names}, got {text!r}")
    return tuple(map(int, numbers))


def arguments(
    config: ConvolutionConfig, sizes: tuple[int, ...]
) -> tuple[tuple[Branch, ...], Array | None, tuple[Array, ...]]:
    """Branches, starts of documents and cotangents of one layer."""
    batch, length, *widths = sizes
    keys = iter(jax.random.split(jax.random.key(0), 5 * len(widths)))

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return (scale * jax.random.normal(next(keys), shape)).astype(config.dtype)

    branches = tuple(
        Branch(
            normal(batch, length, width),
            normal(batch, config.taps - 1, width) if config.taps > 1 else None,
            normal(config.taps, width, scale=0.5),
            normal(width) if config.bias else None,
        )
        for width in widths
    )
    starts = None
    if config.document:
        steps = jnp.arange(length)
        starts = jnp.broadcast_to((steps % config.document == 0) & (steps > 0), (batch, length))
    return branches, starts, tuple(normal(batch, length, width) for width in widths)


def _of_shape(
    config: ConvolutionConfig, shape: str, sizes: tuple[int, ...], tiles: list[Tiles]
) -> list[Row]:
    branches, starts, d_y = arguments(config, sizes)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (branches, d_y))
    expected = jax.jit(partial(_both, xla_convolutions))(wide[0], starts, wide[1])
    kernels = {
        "kernels " + ",".join(map(str, x)): partial(
            short_convolution, tiles=x, interpret=config.interpret
        )
        for x in tiles
    }
    joined = _joined(branches)
    runs: dict[str, tuple[Any, Any]] = {"xla": (xla_convolutions, branches)}
    runs |= {name: (function, branches) for name, function in kernels.items()}
    runs["joined inputs"] = partial(_of_joined, interpret=config.interpret), joined
    rows: list[Row] = []
    for name, (function, own) in runs.items():
        passes = {
            "both": (partial(_both, function), (own, starts, d_y), 5),  # x, y; x, dy, dx
            "forward": (function, (own, starts), 2),
        }
        error = None
        if own is joined:
            y, (gradients,) = expected
            expected = y, (_joined(gradients),)
        for name_of_pass, (run, given, arrays) in passes.items():
            compiled = compile_for(run, *given)
            if error is None:
                error = max(relative_errors(compiled.call(*given), expected).values())
            if not error <= LIMITS[config.dtype]:
                raise SystemExit(
                    f"{name}: expected errors up to {LIMITS[config.dtype]}, got {error}; not timed"
                )
            cost = Cost(0, arrays * sum(x.nbytes for x in d_y))
            timing = measure_compiled(compiled, *given, runs=config.runs)
            rows.append(Row(name, shape, name_of_pass, cost, timing, error))
    return rows


Joined = tuple[Array, tuple[Branch, ...]]


def _joined(branches: tuple[Branch, ...]) -> Joined:
    """Inputs of all branches along the channels, and the branches without theirs."""
    x = jnp.concatenate([branch.x for branch in branches], axis=2)
    return x, tuple(branch._replace(x=None) for branch in branches)


def _of_joined(joined: Joined, starts: Array | None, *, interpret: bool) -> tuple[Array, ...]:
    x, branches = joined
    return short_convolution(branches, starts, joined=x, interpret=interpret)


def xla_convolutions(branches: tuple[Branch, ...], starts: Array | None) -> tuple[Array, ...]:
    """What the layers run where there is no kernel."""
    outputs = []
    for x, tail, taps, bias in branches:
        if tail is None:
            tail = jnp.zeros((x.shape[0], taps.shape[0] - 1, x.shape[2]), x.dtype)
        tail = jnp.pad(tail, ((0, 0), (1, 0), (0, 0)))  # it keeps W inputs, and sees W - 1
        outputs.append(xla_convolution(x, tail, taps, bias, starts))
    return tuple(outputs)


def _both(function: Any, branches: Any, starts: Array | None, d_y: Any) -> Any:
    """Outputs and gradients of every array."""
    outputs, pull = jax.vjp(lambda branches: function(branches, starts), branches)
    return outputs, pull(d_y)


def table(rows: list[Row], device: str, dtype: str) -> str:
    """A line for each shape, pass and implementation."""
    lines = []
    for row in rows:
        floor, seconds = row.cost.floor(device, dtype), row.timing.median
        lines.append(
            [
                row.shape,
                row.passes,
                row.name,
                milliseconds(row.timing),
                f"{row.cost.bytes / seconds / 1e9:.4g}",
                f"{floor * 1e3:.3f}" if floor else "-",
                f"{seconds / floor:.2f}" if floor else "-",
                f"{row.error:.1e}",
                f"{row.timing.compile:.1f}",
            ]
        )
    headers = ["B,T,widths", "pass", "", "ms", "GB/s", "floor ms", "x floor", "error", "compile s"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def _inspect(
    config: ConvolutionConfig, shapes: dict[str, tuple[int, ...]], tiles: list[Tiles]
) -> None:
    lines = []
    for name, sizes in shapes.items():
        given = jax.eval_shape(partial(arguments, config, sizes))
        for x in tiles:
            run = partial(_both, partial(short_convolution, tiles=x))
            for kernel in lowered(run, (9, 0), *given):
                report = compile_kernel(kernel, (9, 0))
                cells = (report.registers, report.spilled, report.shared, kernel.grid[0])
                lines.append([name, ",".join(map(str, x)), kernel.name, *cells])
    headers = ["B,T,widths", "tiles", "kernel", "registers", "spilled B", "shared B", "programs"]
    print(tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True))
