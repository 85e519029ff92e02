"""Timing of compiled functions: warm-up, then the median of repeated blocking runs."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Timing:
    """Times of one compiled function.

    Attributes:
      median: seconds a run.
      spread: seconds between the first and third quartile.
      compile: seconds to trace and compile.
      memory: peak bytes of temporaries and outputs beside the arguments, as the compiler plans
        them, 0 where it does not say; for what the operating system sees use `/usr/bin/time -v`.
    """

    median: float
    spread: float
    compile: float
    memory: int


def measure(function: Callable[..., object], *arguments: object, runs: int) -> Timing:
    """Compiles `function` for `arguments` and times `runs` runs after a warm-up."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compile_time = time.perf_counter() - start
    plan = compiled.memory_analysis()
    for _ in range(3):
        jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    low, median, high = statistics.quantiles(times, n=4)
    memory = plan.temp_size_in_bytes + plan.output_size_in_bytes if plan else 0
    return Timing(median=median, spread=high - low, compile=compile_time, memory=memory)
