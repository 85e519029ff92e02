"""`python -m benchmarks decoding`: each kernel of a token's step alone, and the whole step."""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jax import lax
from jaxtyping import Array
from tabulate import tabulate

from benchmarks.costs import PEAKS
from benchmarks.decoding_cases import cases
from benchmarks.decoding_check import check
from benchmarks.decoding_inspect import report
from benchmarks.timing import model_for_device
from configs import CONFIGS
from mdn_jax import MDNForCausalLM
from mdn_jax.models.fused import FusedWeights, fused_lacks, fused_structure, fused_weights
from mdn_jax.models.structure import LayerSteps
from pallas_kernels.decoding import Tiles
from pallas_kernels.tiling import DecodeTiles


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """Times the kernels' step and each of them, and compares with float32 and the layers."""

    model: str | None = None
    """Name of a configuration, as for `python -m train`; None: mdn_400m, on a CPU smoke."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of parameters and computation."""
    batch_sizes: tuple[int, ...] = (1, 8, 64)
    """Rows decoded at once."""
    parts: tuple[Literal["inspect", "check", "layers", "step", "kernels", "sweep"], ...] = (
        "check",
        "layers",
        "step",
        "kernels",
    )
    """What to do: compile without a GPU for registers and spills, and nothing else; compare; time
    whole steps by the layers; by the kernels; each kernel; each with other tiles, too."""
    check_tokens: int = 32
    """Tokens over which the paths are compared, each fed those that are likeliest in float32: with
    `dtype` float32 both have to take the same."""
    loop: int = 64
    """Runs of a step, or of a kernel on each layer's weights, in one compiled loop."""
    runs: int = 10
    """Timed runs of the loop after the warm-up; the median is shown."""
    layers: int | None = None
    """Layers of the model; None: all."""
    kernels: tuple[str, ...] = ()
    """Of which kernels, by parts of their names; none: all."""
    threads: int = 8
    """Programs compiled at once."""
    interpret: bool = False
    """In the interpreter: that the command works, no figures."""
    output: Path | None = None
    """Where to write the results as JSON."""


class Row(NamedTuple):
    """A kernel, or a whole step.

    Attributes:
      batch: rows.
      name: of the kernel, or "step".
      tiles: of a product, in words.
      seconds: median.
      moved: bytes.
      launches: kernels of the kind in a step.
    """

    batch: int
    name: str
    tiles: str
    seconds: float
    moved: int
    launches: int


class Job(NamedTuple):
    """What is to be timed.

    Attributes:
      row: without its time.
      run: a loop of weights and a carry, which is donated.
      weights: what it does not donate.
      carry: makes the first carry.
      calls: launches or steps of a turn.
    """

    row: Row
    run: Any
    weights: Any
    carry: Callable[[], tuple[Any, ...]]
    calls: int


def decoding(config: Annotated[DecodingConfig, tyro.conf.arg(name="")]) -> None:
    """Fails where the kernels are further from float32 than they may be."""
    name = config.model or model_for_device()
    sizes = CONFIGS[name]().model
    if config.layers is not None:
        sizes = dataclasses.replace(sizes, num_hidden_layers=config.layers)
    if "inspect" in config.parts:
        print(report(sizes, config.dtype, config.batch_sizes))
        return
    dtype = jnp.dtype(config.dtype)
    model = MDNForCausalLM(sizes, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    if lacking := fused_lacks(model, interpret=config.interpret):
        raise SystemExit(f"model: the kernels expect {lacking}")
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {name}, {config.dtype}", flush=True)
    weights = fused_weights(model)
    rows: list[Row] = []
    checks: list[str] = []
    wrong: list[str] = []
    for batch in config.batch_sizes:
        if "check" in config.parts:
            line, right = check(
                model, weights, batch, config.check_tokens, interpret=config.interpret
            )
            print(line, flush=True)
            checks.append(line)
            if not right:
                wrong.append(line)
        found = _timed(config, list(_jobs(config, model, weights, batch)))
        if found:
            print(table(found, device), flush=True)
        rows += found
    if config.output:
        results = {
            "device": device,
            "jax": jax.__version__,
            "config": dataclasses.asdict(config),
            "checks": checks,
            "results": [row._asdict() for row in rows],
        }
        config.output.write_text(json.dumps(results, indent=1, default=str))
    if wrong:
        raise SystemExit("\n".join(wrong))


def _jobs(
    config: DecodingConfig, model: MDNForCausalLM, weights: FusedWeights, batch: int
) -> Iterator[Job]:
    structure = fused_structure(model, interpret=config.interpret)
    graph, state = nnx.split(model)
    cache: Any = jax.eval_shape(lambda: model.init_cache(batch))
    moved = sum(x.nbytes for x in jax.tree.leaves((weights.layers, weights.head)))
    moved += 2 * sum(4 * x.size for entry in cache for x in jax.tree.leaves(entry.state))

    def again(make: Callable[[Any], Any]) -> Callable[..., Any]:
        def run(weights: Any, memory: Any, token: Array) -> Any:
            steps = make(weights)

            def body(_: Any, carry: Any) -> Any:
                memory, token = carry
                logits, memory = steps.step(memory, token)
                return memory, jnp.argmax(logits, axis=-1).astype(jnp.int32)

            return lax.fori_loop(0, config.loop, body, (memory, token))

        return jax.jit(run, donate_argnums=(1, 2))

    def token() -> Array:
        return jnp.zeros((batch,), jnp.int32)

    def entered() -> tuple[Any, ...]:
        return structure.steps(weights).enter(model.init_cache(batch)), token()

    def row(name: str, moved: int, launches: int, tiles: str = "") -> Row:
        return Row(batch, name, tiles, 0.0, moved, launches)

    if "step" in config.parts:
        run = again(structure.steps)
        yield Job(row("step, kernels", moved, 1), run, weights, entered, 1)
    if "layers" in config.parts:
        run = again(lambda state: LayerSteps(nnx.merge(graph, state)))
        carry = lambda: (model.init_cache(batch), token())  # noqa: E731
        yield Job(row("step, layers", moved, 1), run, state, carry, 1)
    if not {"kernels", "sweep"} & {*config.parts}:
        return
    for kernel in cases(weights, batch, structure.plan):
        if config.kernels and not any(part in kernel.name for part in config.kernels):
            continue
        tiles: list[Tiles | DecodeTiles | None] = [None]
        if "sweep" in config.parts:
            tiles += kernel.others
        for choice in tiles:
            plan = structure.plan
            if choice is not None:
                plan = plan._replace(tiles=((kernel.name, choice),))
            count = len(kernel.weights)
            words = "shipped" if choice is None else " ".join(map(str, choice))
            line = row(kernel.name, kernel.moved // count, count, words)
            run = kernel.loop(plan, config.loop)
            yield Job(line, run, kernel.weights, kernel.carry, count)


def _timed(config: DecodingConfig, jobs: list[Job]) -> list[Row]:
    """The rows with their times; jobs that fail are named and left out."""
    rows = []
    with ThreadPoolExecutor(config.threads) as pool:
        compiled: list[Future[Any]] = []
        for job in jobs:
            lowered = job.run.lower(job.weights, *jax.eval_shape(job.carry))
            compiled.append(pool.submit(lowered.compile))
        for job, program in zip(jobs, compiled, strict=True):
            try:
                run = program.result()
                times, carry = [], job.carry()
                for _ in range(config.runs + 2):
                    start = time.perf_counter()
                    carry = jax.block_until_ready(run(job.weights, *carry))
                    times.append((time.perf_counter() - start) / config.loop)
            except Exception as failure:  # of any kind: the others still count
                kind = type(failure).__name__
                print(f"{job.row.name} {job.row.tiles}: {kind}: {str(failure)[:200]}")
                continue
            rows.append(job.row._replace(seconds=statistics.median(times[2:]) / job.calls))
            print(*table(rows[-1:], jax.devices()[0].device_kind).splitlines()[2:], flush=True)
    return rows


def table(rows: list[Row], device: str) -> str:
    """One row a kernel: microseconds a launch, its floor by bytes, and launches of a step."""
    peak = PEAKS.get(device)
    lines = [
        [
            row.batch,
            row.name,
            row.tiles,
            f"{row.seconds * 1e6:.2f}",
            f"{row.moved / 1e6:.2f}",
            f"{row.moved / row.seconds / 1e9:.0f}",
            f"{row.moved / peak.bandwidth * 1e6:.2f}" if peak else "-",
            f"{row.launches * row.seconds * 1e6:.0f}",
        ]
        for row in rows
    ]
    headers = ["batch", "", "tiles", "us", "MB", "GB/s", "floor us", "us a token"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
