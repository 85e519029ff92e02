"""`python -m benchmarks serving`: tokens/s beside the bare loop, first tokens, and endurance."""

import gc
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks.timing import model_for_device
from configs import CONFIGS
from mdn_jax import MDNForCausalLM
from mdn_jax.models import Decoder, Sampling, prefill, sampling_arrays
from mdn_jax.ops.api import Implementation
from mdn_jax.serving.app import Service
from mdn_jax.serving.device import Device
from mdn_jax.serving.engine import Engine
from mdn_jax.serving.jobs import MOST_STOP_TOKENS
from mdn_jax.serving.limits import Limits
from mdn_jax.serving.prefixes import PrefixCache
from mdn_jax.serving.server import in_background
from mdn_jax.serving.texts import Texts
from mdn_jax.text.text import ByteText

_NAME = "random"
_ALONE = 3
"""Streams whose text is compared with that of the same request alone."""


@dataclass(frozen=True)
class ServingConfig:
    """Serves a model of random weights, to clients in processes of their own."""

    model: str | None = None
    """Name of a configuration, as for `python -m train`; None: mdn_400m, on a CPU smoke."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Of parameters and computation."""
    implementation: Implementation | None = None
    """Of the momentum delta rule; None: the best one."""
    streams: int = 8
    """Texts at once, and slots."""
    tokens: int = 256
    """Tokens of a text, on average; under load at most."""
    prompt: int = 100
    """Tokens of a prompt; under load at most."""
    rounds: int = 2
    """Texts of a stream, one after another."""
    block: int = 16
    """Tokens in one call of the compiled loop."""
    together: int | None = None
    """Short prompts in one call, as of mdn-serve."""
    seconds: float | None = None
    """Load of random arrivals, lengths and cancellations for this long, by the openai package, in
    place of the measurement."""
    output: Path | None = None
    """Where to write the results as JSON."""

    def __post_init__(self) -> None:
        if self.model is not None and self.model not in CONFIGS:
            raise ValueError(f"model: expected one of {', '.join(CONFIGS)}, got {self.model!r}")
        for name in ("streams", "tokens", "prompt", "rounds", "block"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds: expected a number > 0 or None, got {self.seconds!r}")


def serving(config: Annotated[ServingConfig, tyro.conf.arg(name="")]) -> None:
    """Times the server beside the bare loop, or loads it with texts that have to be right."""
    name = config.model or model_for_device()
    model = MDNForCausalLM(
        CONFIGS[name]().model,
        implementation=config.implementation,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.dtype),
        rngs=nnx.Rngs(0),
    )
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "model": name,
        "dtype": config.dtype,
        "streams": config.streams,
        "block": config.block,
    }
    if config.seconds is None:
        bare = bare_loop(config, model)
        report |= {"bare_tokens_per_second": bare} | measure(config, model)
        report["of_bare"] = report["server_tokens_per_second"] / bare
    else:
        report |= endure(config, model)
    text = json.dumps(report, indent=1)
    print(text)
    if config.output:
        config.output.write_text(text + "\n")
    if report.get("different"):
        raise SystemExit("different: expected every text as when it was alone, got others")


def bare_loop(config: ServingConfig, model: MDNForCausalLM) -> float:
    """Tokens a second of as many rows in the compiled loop alone, the first blocks not counted."""
    rows = config.streams
    rng = np.random.default_rng(0)
    prompts = rng.integers(256, size=(rows, config.prompt)).tolist()
    state, decoder = prefill(model, prompts), Decoder(model)
    sampling = sampling_arrays(
        _sampling(), rows, vocab_size=model.config.vocab_size, dtype=state.logits.dtype, bias=True
    )
    stop = np.full((rows, MOST_STOP_TOKENS), -1, np.int32)  # the server's program
    limits = np.full((rows,), config.block, np.int32)
    times = []
    for _ in range(max(8, config.tokens // config.block)):
        began = time.perf_counter()
        block = decoder.block(state, limits, sampling, stop, size=config.block, donate=True)
        np.asarray(block.tokens)
        state = block.state
        times.append(time.perf_counter() - began)
    return rows * config.block / statistics.median(times[2:])


def measure(config: ServingConfig, model: MDNForCausalLM) -> dict[str, Any]:
    """The server's figures; a few texts are compared with those of the same requests alone."""
    rng = random.Random(0)
    lanes = [
        [_request(rng, config, lane * config.rounds + i) for i in range(config.rounds)]
        for lane in range(config.streams)
    ]
    with _served(config, model) as (engine, port):
        _ask("streams", {"port": port, "lanes": [[_request(rng, config, 0)]]})  # imports are done
        before = engine.metrics.engine_time()
        found = _ask("streams", {"port": port, "lanes": lanes})
        after = engine.metrics.engine_time()
        picked = [lanes[lane][-1] for lane in range(min(_ALONE, config.streams))]
        (alone,) = _ask("streams", {"port": port, "lanes": [picked]})
        state_bytes = engine.device.state_bytes
    together = [found[lane][-1]["text"] for lane in range(len(picked))]
    first = [1e3 * (x["times"][0] - x["began"]) for lane in found for x in lane]
    burst, later = first[:: config.rounds], [x for i, x in enumerate(first) if i % config.rounds]
    return {
        "server_tokens_per_second": _rate([lane[:1] for lane in found]),
        "with_arrivals_tokens_per_second": _rate(found),
        "first_token_ms": {
            "all_at_once": _quantiles(burst),
            "while_others_run": _quantiles(later) if later else None,
        },
        "engine_seconds": {part: after[part] - before[part] for part in after},
        "state_bytes": state_bytes,
        "different": [i for i, x in enumerate(alone) if x["text"] != together[i]],
        "compared": len(picked),
    }


def endure(config: ServingConfig, model: MDNForCausalLM) -> dict[str, Any]:
    """Load for some time: texts, memory at its beginning and end, slots that are still taken."""
    job = {
        "model": _NAME,
        "requests": 48,
        "prompt": config.prompt,
        "tokens": config.tokens,
        "streams": config.streams,
        "seconds": config.seconds,
        "pause": 0.05,
        "seed": 0,
    }
    with _served(config, model) as (engine, port), _memory() as samples:
        found = _ask("load", job | {"port": port})
        late = time.monotonic() + 30
        while engine.active + engine.waiting and time.monotonic() < late:
            time.sleep(0.01)
        lost = engine.active + engine.waiting
    third = max(1, len(samples) // 3)
    for place, name in enumerate(("arrays", "resident")):
        taken = [sample[place] for sample in samples]
        found[f"{name}_mb"] = [max(taken[:third]) / 1e6, max(taken[-third:]) / 1e6]
    return found | {"seconds": config.seconds, "slots_lost": lost}


def _sampling() -> Sampling:
    return Sampling(vocab_limit=ByteText.vocab_limit)


def _request(rng: random.Random, config: ServingConfig, number: int) -> dict[str, Any]:
    return {
        "prompt": [rng.randrange(256) for _ in range(config.prompt)],
        "max_tokens": max(1, round(config.tokens * rng.uniform(0.5, 1.5))),
        "seed": number,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


@contextmanager
def _served(config: ServingConfig, model: MDNForCausalLM) -> Iterator[tuple[Engine, int]]:
    """The server in this process, as `mdn-serve` has it."""
    limits = Limits(slots=config.streams, max_tokens=4 * config.tokens)
    device = Device(
        model,
        slots=limits.slots,
        piece=512,
        block=config.block,
        max_length=4096,
        end_tokens=0,
        top=20,
        together=config.together,
    )
    engine = Engine(device, limits, PrefixCache(8 * device.state_bytes))
    service = Service(engine, Texts(ByteText()), name=_NAME, limits=limits)
    with in_background(service.app(), engine) as port:
        yield engine, port


def _ask(module: str, job: dict[str, Any]) -> Any:
    """What a client in a process of its own brings."""
    command = [sys.executable, "-m", f"benchmarks.serving.{module}"]
    done = subprocess.run(
        command, input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def _rate(found: list[list[dict[str, Any]]]) -> float:
    """Tokens a second while all streams run: from the last first token to the first last one.

    With one text a stream no prompt is read meanwhile; with several, those that follow are.
    """
    start = max(lane[0]["times"][0] for lane in found)
    end = min(lane[-1]["times"][-1] for lane in found)
    tokens = 0
    for text in (text for lane in found for text in lane):
        before = 0
        for at, count in zip(text["times"], text["counts"], strict=True):
            tokens += count - before if start < at <= end else 0
            before = count
    return tokens / (end - start)


def _quantiles(times: list[float]) -> dict[str, float]:
    return {"p50": float(np.quantile(times, 0.5)), "p99": float(np.quantile(times, 0.99))}


@contextmanager
def _memory() -> Iterator[list[tuple[int, int]]]:
    """Bytes of arrays and of the process, a sample about twice a second."""
    samples: list[tuple[int, int]] = []
    done = threading.Event()

    def watch() -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not done.wait(0.5):
            gc.collect()
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            samples.append((sum(x.nbytes for x in jax.live_arrays()), resident))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
