"""`python -m benchmarks decoding`: each kernel of a token's step alone, and the whole step."""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax import lax
from jaxtyping import Array
from tabulate import tabulate

from benchmarks.costs import PEAKS
from benchmarks.timing import model_for_device
from configs import CONFIGS
from mdn_jax import MDNForCausalLM
from mdn_jax.models.fused import fused_lacks, fused_structure, fused_weights
from mdn_jax.models.structure import LayerSteps
from pallas_kernels.decoding import LayerMemory, Plan, Stream, Tiles, kernels, product_tiles

LIMITS = {"bfloat16": 2e-2, "float32": 1e-4}
"""Of the largest difference of log-probabilities."""


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """Checks the fused step against the model's layers, then times it and its kernels."""

    model: str | None = None
    """Name of a configuration, as for `python -m train`; None: mdn_400m, on a CPU smoke."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of parameters and computation."""
    batch_sizes: tuple[int, ...] = (1, 8, 64)
    """Rows decoded at once."""
    check_tokens: int = 64
    """Tokens over which both paths are compared, each fed the same tokens; 0: none."""
    loop: int = 64
    """Runs of a step, or of a kernel on each layer's weights, in one compiled loop."""
    runs: int = 10
    """Timed runs of the loop after the warm-up; the median is shown."""
    layers: int | None = None
    """Layers of the model; None: all."""
    sweep: bool = False
    """Time products with other tiles, too."""
    kernels: bool = True
    """Time each kernel by itself."""
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


def decoding(config: Annotated[DecodingConfig, tyro.conf.arg(name="")]) -> None:
    """Fails where the fused step is wrong; what it times is right."""
    name = config.model or model_for_device()
    sizes = CONFIGS[name]().model
    if config.layers is not None:
        sizes = dataclasses.replace(sizes, num_hidden_layers=config.layers)
    dtype = jnp.dtype(config.dtype)
    model = MDNForCausalLM(sizes, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    if lacking := fused_lacks(model, interpret=config.interpret):
        raise SystemExit(f"model: the kernels expect {lacking}")
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {name}, {config.dtype}")
    rows: list[Row] = []
    wrong: list[str] = []
    for batch in config.batch_sizes:
        if config.check_tokens:
            line, right = _check(config, model, batch)
            print(line, flush=True)
            if not right:
                wrong.append(line)
        rows += _steps(config, model, batch)
        if config.kernels:
            rows += _kernels(config, model, batch)
        print(table([row for row in rows if row.batch == batch], device), flush=True)
    if config.output:
        report = {
            "device": device,
            "jax": jax.__version__,
            "config": dataclasses.asdict(config),
            "results": [row._asdict() for row in rows],
        }
        config.output.write_text(json.dumps(report, indent=1, default=str))
    if wrong:
        raise SystemExit("\n".join(wrong))


def _check(config: DecodingConfig, model: MDNForCausalLM, batch: int) -> tuple[str, bool]:
    """Log-probabilities of both paths, each fed the likeliest tokens of the model's layers."""
    structure = fused_structure(model, interpret=config.interpret)
    weights, cache = fused_weights(model), model.init_cache(batch)
    graph, state = nnx.split(model)

    @jax.jit
    def by_layers(state: Any, cache: Any, tokens: Array) -> tuple[Array, Any]:
        return LayerSteps(nnx.merge(graph, state)).step(cache, tokens)

    @jax.jit
    def by_kernels(weights: Any, memory: Any, tokens: Array) -> tuple[Array, Any]:
        return structure.steps(weights).step(memory, tokens)

    memory = jax.jit(structure.steps(weights).enter)(cache)
    tokens = jnp.asarray(
        np.random.default_rng(0).integers(model.config.vocab_size, size=batch), jnp.int32
    )
    worst, same, total = 0.0, 0, 0
    for _ in range(config.check_tokens):
        expected, cache = by_layers(state, cache, tokens)
        got, memory = by_kernels(weights, memory, tokens)
        difference = jax.nn.log_softmax(got) - jax.nn.log_softmax(expected)
        worst = max(worst, float(jnp.max(jnp.abs(difference))))
        tokens = jnp.argmax(expected, axis=-1).astype(jnp.int32)
        same += int(jnp.sum(jnp.argmax(got, axis=-1) == tokens))
        total += batch
    right = worst <= LIMITS[config.dtype]
    line = (
        f"batch {batch}: log-probabilities over {config.check_tokens} tokens differ by at most "
        f"{worst:.1e}, the likeliest token is the same in {same:,} of {total:,}"
    )
    return line + ("" if right else f": WRONG, expected {LIMITS[config.dtype]:.0e}"), right


def _steps(config: DecodingConfig, model: MDNForCausalLM, batch: int) -> list[Row]:
    """Whole steps, with the likeliest token, in a compiled loop."""
    structure = fused_structure(model, interpret=config.interpret)
    weights = fused_weights(model)
    graph, state = nnx.split(model)
    token = jnp.zeros((batch,), jnp.int32)
    cache = model.init_cache(batch)
    moved = sum(x.nbytes for x in jax.tree.leaves((weights.layers, weights.head)))
    moved += 2 * sum(x.nbytes for x in jax.tree.leaves([entry.state for entry in cache]))

    def again(make: Callable[[Any], Any]) -> Callable[..., Any]:
        def run(weights: Any, memory: Any, token: Array) -> Any:
            steps = make(weights)

            def body(_: Any, carry: Any) -> Any:
                memory, token = carry
                logits, memory = steps.step(memory, token)
                return memory, jnp.argmax(logits, axis=-1).astype(jnp.int32)

            return lax.fori_loop(0, config.loop, body, (memory, token))

        return jax.jit(run, donate_argnums=1)

    memory = structure.steps(weights).enter(cache)
    fused = _time(config, again(structure.steps), weights, memory, jnp.copy(token))
    by_layers = again(lambda state: LayerSteps(nnx.merge(graph, state)))
    layers = _time(config, by_layers, state, model.init_cache(batch), token)
    return [
        Row(batch, "step, layers", "", layers, moved, 1),
        Row(batch, "step, fused", "", fused, moved, 1),
    ]


def _time(config: DecodingConfig, run: Callable[..., Any], weights: Any, *carry: Any) -> float:
    """Median seconds of one turn of the loop; the carry is donated."""
    times = []
    for _ in range(config.runs + 2):
        start = time.perf_counter()
        carry = jax.block_until_ready(run(weights, *carry))
        times.append((time.perf_counter() - start) / config.loop)
    return statistics.median(times[2:])


def _kernels(config: DecodingConfig, model: MDNForCausalLM, batch: int) -> list[Row]:
    """Each kernel by itself: one launch for each layer a turn, so that no cache has the weights."""
    structure = fused_structure(model, interpret=config.interpret)
    weights = fused_weights(model)
    rows = []
    for kernel in _cases(weights, model, batch, structure.plan):
        tiles: list[Tiles | None] = [None]
        if config.sweep and kernel.product is not None:
            tiles += list(others(batch, *kernel.product))
        for choice in tiles:
            plan = structure.plan
            if choice is not None:
                plan = plan._replace(tiles=((kernel.name, choice),))
            try:
                run = kernel.loop(plan, config.loop)
                seconds = _time(config, run, kernel.weights, *kernel.carry())
            except Exception as failure:  # of any kind: the others still count
                print(f"{kernel.name} {choice}: {type(failure).__name__}: {str(failure)[:200]}")
                continue
            words = "shipped" if choice is None else " ".join(map(str, choice))
            count = len(kernel.weights)
            moved = kernel.moved // count
            rows.append(Row(batch, kernel.name, words, seconds / count, moved, count))
    return rows


class _Case(NamedTuple):
    """A kernel with what it runs on.

    Attributes:
      name: of the kernel.
      weights: of every layer.
      run: of a plan, a layer's weights, a carry and the layer, to the next carry.
      carry: makes the first carry.
      moved: bytes, over all layers.
      product: outputs, width, bytes of a weight, matrices; None: no product.
    """

    name: str
    weights: list[Any]
    run: Callable[[Plan, Any, Any, int], Any]
    carry: Callable[[], tuple[Any, ...]]
    moved: int
    product: tuple[int, int, int, int] | None

    def loop(self, plan: Plan, count: int) -> Callable[..., Any]:
        """`count` turns, each over all layers."""

        def turns(weights: Any, *carry: Any) -> Any:
            def body(_: Any, carry: Any) -> Any:
                for i, own in enumerate(weights):
                    carry = self.run(plan, own, carry, i)
                return carry

            return lax.fori_loop(0, count, body, carry)

        return jax.jit(turns, donate_argnums=tuple(range(1, 1 + len(self.carry()))))


def _cases(weights: Any, model: MDNForCausalLM, batch: int, plan: Plan) -> Iterator[_Case]:
    hidden, dtype = model.config.hidden_size, model.dtype
    layers, first = list(weights.layers), weights.layers[0]
    itemsize = jnp.dtype(dtype).itemsize
    key = jax.random.key(0)

    def stream() -> Stream:
        h = jax.random.normal(key, (batch, hidden)).astype(dtype)
        return Stream(h, jnp.sum(jnp.square(h.astype(jnp.float32)), axis=1, keepdims=True))

    def sizes(matrix: Array, matrices: int = 1) -> tuple[int, int, int, int]:
        return matrix.shape[0] // matrices, matrix.shape[1], itemsize, matrices

    def nudged(stream: Stream, by: Array) -> Stream:
        """A stream that depends on a result, so that nothing is left out."""
        return Stream(stream.h, stream.squares + 1e-30 * by.astype(jnp.float32))

    def bytes_of(*names: str) -> int:
        return sum(getattr(x, name).nbytes for x in layers for name in names)

    def projections(plan: Plan, own: Any, carry: Any, _: int) -> Any:
        (x,) = carry
        out = kernels.projections(x, own.projections, plan)
        return (nudged(x, out.gates[:, :1]),)

    yield _Case(
        "mdn_decode_projections",
        layers,
        projections,
        lambda: (stream(),),
        bytes_of("projections"),
        sizes(first.projections),
    )

    projected = kernels.projections(stream(), first.projections, plan)
    states = [jnp.zeros((batch, plan.value_heads, plan.key_dim, plan.value_dim)) for _ in range(2)]

    def mixer(plan: Plan, own: Any, carry: Any, i: int) -> Any:
        memories, projected, slot, active = carry
        mixed, memory = kernels.mixer(projected, own, memories[i], slot, active, plan)
        memories = (*memories[:i], memory, *memories[i + 1 :])
        gates = projected.gates + 1e-30 * mixed.gated[:, :1]
        return memories, projected._replace(gates=gates), slot, active

    def memories() -> tuple[Any, ...]:
        tail = (batch, plan.conv_size, plan.channels)
        each = tuple(LayerMemory(*map(jnp.copy, states), jnp.zeros(tail, dtype)) for _ in layers)
        copies = jax.tree.map(jnp.copy, projected)
        return each, copies, jnp.zeros((batch,), jnp.int32), jnp.ones((batch,), jnp.int32)

    moved = 2 * sum(x.nbytes for x in states) * len(layers)
    yield _Case("mdn_decode_mixer", layers, mixer, memories, moved, None)

    memory = memories()[0][0]
    ones = jnp.ones((batch,), jnp.int32)
    mixed, _ = kernels.mixer(projected, first, memory, 0 * ones, ones, plan)

    def output(plan: Plan, own: Any, carry: Any, _: int) -> Any:
        h, mixed = carry
        return kernels.output(h, mixed, own.output, plan).h, mixed

    yield _Case(
        "mdn_decode_output",
        layers,
        output,
        lambda: (stream().h, jax.tree.map(jnp.copy, mixed)),
        bytes_of("output"),
        sizes(first.output),
    )

    def up(plan: Plan, own: Any, carry: Any, _: int) -> Any:
        (x,) = carry
        return (nudged(x, kernels.up(x, own.up, plan)[:, :1]),)

    yield _Case(
        "mdn_decode_up", layers, up, lambda: (stream(),), bytes_of("up"), sizes(first.up, 2)
    )

    activations = kernels.up(stream(), first.up, plan)

    def down(plan: Plan, own: Any, carry: Any, _: int) -> Any:
        h, activations = carry
        return kernels.down(h, activations, own.down, plan).h, activations

    yield _Case(
        "mdn_decode_down",
        layers,
        down,
        lambda: (stream().h, jnp.copy(activations)),
        bytes_of("down"),
        sizes(first.down),
    )

    def head(plan: Plan, own: Any, carry: Any, _: int) -> Any:
        (x,) = carry
        return (nudged(x, kernels.logits(x, own, plan)[:, :1]),)

    yield _Case(
        "mdn_decode_head",
        [weights.head],
        head,
        lambda: (stream(),),
        weights.head.nbytes,
        sizes(weights.head),
    )


def others(batch: int, outputs: int, width: int, itemsize: int, matrices: int) -> Iterator[Tiles]:
    """Tiles near those that ship."""
    shipped = product_tiles(batch, outputs, width, itemsize, matrices=matrices)
    if not shipped.dot:
        for block, warps in ((4, 4), (16, 16), (16, 8), (8, 4), (4, 8)):
            if (block, warps) != (shipped.outputs, shipped.warps):
                yield shipped._replace(outputs=block, warps=warps)
        for dot in (16, 32):
            yield Tiles(16, dot, min(width & -width, 256), 1, 4, 4, dot=True)
        return
    for rows in (16, 32, 64):
        if rows > 16 and rows // 2 >= batch:
            continue
        for block in (16, 32, 64, 128):
            for step, stages in ((128, 4), (256, 3), (64, 6)):
                if step > (width & -width) or (rows + matrices * block) * step * stages > 100_000:
                    continue
                for warps in (4, 8):
                    if warps == 8 and block * matrices < 64:
                        continue
                    tiles = Tiles(rows, block, step, 1, warps, stages, dot=True)
                    if tiles != shipped:
                        yield tiles


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
