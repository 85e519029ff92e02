"""`python -m benchmarks generation`: speed and memory of decoding, early and late in a text."""

import gc
import json
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from tabulate import tabulate

from benchmarks.launches import TokenLaunches, of_a_token
from benchmarks.timing import model_for_device
from configs import CONFIGS
from mdn_jax import MDNForCausalLM
from mdn_jax.models import Decoder, GenerationState, generate, prefill, stream, with_states
from mdn_jax.models.prefill import piece_width
from mdn_jax.models.steps import StepKind
from mdn_jax.ops.api import Implementation
from mdn_jax.ops.state import StateDtype

FIRST = 100
"""Tokens of the prompt whose first token is timed."""


@dataclass(frozen=True)
class GenerationConfig:
    """Decodes with random weights after prompts of several lengths."""

    model: str | None = None
    """Name of a configuration, as for `python -m train`; None: mdn_400m, on a CPU smoke."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of parameters and computation."""
    implementation: Implementation | None = None
    """Of the momentum delta rule; None: the best one."""
    steps: tuple[StepKind, ...] = ("layers",)
    """What takes single tokens: the model's layers, or few, wide kernels (`Decoder`); or both, one
    after the other."""
    state_dtype: StateDtype = "float32"
    """Of the states of momentum delta rules while decoding."""
    replay: int | None = None
    """They are written every so many tokens: 4, 8 or 16; None: with every token."""
    batch_sizes: tuple[int, ...] | None = None
    """Rows decoded at once; None: 1, 8 and 64, on a CPU 1."""
    positions: tuple[int, ...] | None = None
    """Tokens before those that are timed; None: 1,000 and 100,000, on a CPU 1,000."""
    tokens: int = 256
    """Tokens to time."""
    block: int = 64
    """Tokens in one call of the compiled loop."""
    piece: int = 8192
    """Tokens of the prompts in one call of the model, over all rows."""
    output: Path | None = None
    """Where to write the results as JSON."""

    def __post_init__(self) -> None:
        if self.model is not None and self.model not in CONFIGS:
            raise ValueError(f"model: expected one of {', '.join(CONFIGS)}, got {self.model!r}")
        if self.block < 2 or self.tokens < 2 * self.block:
            raise ValueError(
                f"tokens: expected at least two blocks (block >= 2), got {self.tokens} and "
                f"block = {self.block}"
            )


class Row(NamedTuple):
    """Decoding at one position.

    Attributes:
      steps: what takes single tokens.
      batch_size: rows.
      position: tokens before.
      prefill: tokens a second of the prompts, over all rows; None without a second whole piece.
      step: seconds a token of every row, median over the blocks.
      memory: most bytes in use while decoding.
      state: bytes of the caches.
      launches: kernels a token; None where they cannot be counted.
    """

    steps: StepKind
    batch_size: int
    position: int
    prefill: float | None
    step: float
    memory: int
    state: int
    launches: TokenLaunches | None


def generation(config: Annotated[GenerationConfig, tyro.conf.arg(name="")]) -> None:
    """Times decoding and watches its memory, at each batch size and position."""
    device = jax.devices()[0].device_kind
    name, on_cpu = config.model or model_for_device(), jax.default_backend() == "cpu"
    model = MDNForCausalLM(
        CONFIGS[name]().model,
        implementation=config.implementation,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.dtype),
        rngs=nnx.Rngs(0),
    )
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(
        f"{device}, jax {jax.__version__}, {name}: {parameters:,} parameters, "
        f"{config.dtype}; {config.tokens} tokens of each row in blocks of {config.block}, the "
        "first block not counted; memory: the most in use while decoding"
    )
    first, rows = {}, []
    for steps in config.steps:
        decoder = Decoder(model, steps=steps)
        first[steps] = _first_token(decoder)
        print(
            f"a prompt of {FIRST} tokens, its first token after {first[steps] * 1e3:.1f} ms by the "
            f"{steps} (median, compiled)"
        )
        rows += [
            _run(config, decoder, steps, batch_size, position)
            for batch_size in config.batch_sizes or ((1,) if on_cpu else (1, 8, 64))
            for position in config.positions or ((1_000,) if on_cpu else (1_000, 100_000))
        ]
    print(table(rows))
    if any(row.launches is None for row in rows):
        print("kernels: -: no GPU launches any, or its trace has none that could be counted")
    if config.output:
        report = {
            "device": device,
            "jax": jax.__version__,
            "config": asdict(config),
            "first_token": first,
            "results": [_record(row) for row in rows],
        }
        config.output.write_text(json.dumps(report, indent=1, default=str))


def table(rows: list[Row]) -> str:
    """One row a batch size and position, kernels and copies a token in the last two columns."""
    headers = ["steps", "batch", "position", "prefill tokens/s", "ms a token", "tokens/s", "MB"]
    headers += ["MB states", "kernels", "copies"]
    lines = [
        [
            row.steps,
            row.batch_size,
            f"{row.position:,}",
            f"{row.prefill:,.0f}" if row.prefill else "-",
            f"{row.step * 1e3:.3f}",
            f"{row.batch_size / row.step:,.0f}",
            f"{row.memory / 1e6:,.1f}",
            f"{row.state / 1e6:,.1f}",
            f"{row.launches.total:g}" if row.launches else "-",
            f"{row.launches.copies:g}" if row.launches else "-",
        ]
        for row in rows
    ]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def _record(row: Row) -> dict[str, Any]:
    launches = None if row.launches is None else row.launches._asdict()
    return row._asdict() | {"launches": launches}


def _first_token(decoder: Decoder, times: int = 10) -> float:
    """Median seconds from a prompt to its first token, compiled before."""
    vocab, rng = decoder.config.vocab_size, np.random.default_rng(0)
    prompts = [rng.integers(vocab, size=FIRST).tolist() for _ in range(times)]
    seconds = []
    for prompt in [prompts[0], *prompts]:
        began = time.perf_counter()
        generate(decoder, [prompt], max_new_tokens=1)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _run(
    config: GenerationConfig, decoder: Decoder, steps: StepKind, batch_size: int, position: int
) -> Row:
    state, prompt_speed = _read(config, decoder, batch_size, position)
    state = with_states(
        decoder.model, state, state_dtype=config.state_dtype, replay=config.replay or 0
    )
    # compiles, which takes memory of its own; nothing is kept
    deque(stream(decoder, state, max_new_tokens=config.block + 1, block=config.block), maxlen=0)
    times = []
    with _most_bytes_in_use() as memory:
        began = time.perf_counter()
        for piece in stream(decoder, state, max_new_tokens=config.tokens + 1, block=config.block):
            jax.block_until_ready(piece.state)
            now = time.perf_counter()
            memory.append(_bytes_in_use())  # of the state before and the one after
            state = piece.state
            if len(piece.tokens[0]) == config.block:  # not the first token, nor a short last block
                times.append((now - began) / config.block)
            began = time.perf_counter()
    cache = sum(x.nbytes for x in jax.tree.leaves(state.cache))
    launches = of_a_token(decoder, state, block=config.block)
    step = statistics.median(times[1:])
    return Row(steps, batch_size, position, prompt_speed, step, max(memory), cache, launches)


def _read(
    config: GenerationConfig, decoder: Decoder, batch_size: int, position: int
) -> tuple[GenerationState, float | None]:
    """The state after random prompts, and tokens a second of whole pieces but the first."""
    rng = np.random.default_rng(position)
    prompts = rng.integers(decoder.config.vocab_size, size=(batch_size, position))
    width = min(piece_width(config.piece, batch_size), position)
    # compiles; the pieces between have the shape of the first
    state = jax.block_until_ready(prefill(decoder, prompts[:, :width], piece=config.piece))
    whole = position // width * width
    seconds = 0.0
    for start, stop in ((width, whole), (whole, position)):
        if start < stop:
            began = time.perf_counter()
            state = prefill(decoder, prompts[:, start:stop], state=state, piece=config.piece)
            jax.block_until_ready(state)
            if start == width:
                seconds = time.perf_counter() - began
    return state, batch_size * (whole - width) / seconds if whole > width else None


@contextmanager
def _most_bytes_in_use() -> Iterator[list[int]]:
    """A list of bytes in use, which grows while the context lasts."""
    gc.collect()  # what nobody uses any more is not in use
    seen = [_bytes_in_use()]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(_bytes_in_use())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def _bytes_in_use() -> int:
    counted = jax.devices()[0].memory_stats()
    if counted:
        return int(counted["bytes_in_use"])
    return sum(x.nbytes for x in jax.live_arrays())
