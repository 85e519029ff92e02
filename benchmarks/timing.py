"""Timing of compiled functions: compile once, warm up, then the median of repeated groups of calls.

On a GPU a call returns before its work is done. A group of calls without a wait between them, and
one wait after the last, costs the device's time alone: launching the next call overlaps with the
work of this one. On a CPU a group is one call.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

GROUP_SECONDS = 0.05
"""How long a group of calls lasts at least on a GPU.

To launch the first call and wait for the last is not the device's time: in groups of 10 ms it was
2 to 5 % of what they lasted, and most of the spread (docs/notebook/2026-11-kernels.md).
"""


@dataclass(frozen=True)
class Timing:
    """Times of one compiled function.

    Attributes:
      median: seconds a call.
      spread: seconds between the first and third quartile of the groups.
      compile: seconds to trace and compile.
      memory: peak bytes of temporaries and outputs beside the arguments, as the compiler plans
        them, 0 where it does not say; for what the operating system sees use `/usr/bin/time -v`.
      peak: peak bytes beside what was there before the first call, as the device counts them; None
        where it does not count, or had needed more before, so that the count cannot tell.
      calls: calls in a group.
    """

    median: float
    spread: float
    compile: float
    memory: int
    peak: int | None
    calls: int


class Compiled(NamedTuple):
    """A function compiled for its arguments.

    Attributes:
      call: takes the arguments.
      seconds: to trace and compile.
      memory: as `Timing.memory`.
    """

    call: Callable[..., Any]
    seconds: float
    memory: int


def compile_for(function: Callable[..., object], *arguments: object) -> Compiled:
    """Compiles `function` for arguments of these shapes; donates none."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    plan = compiled.memory_analysis()
    memory = plan.temp_size_in_bytes + plan.output_size_in_bytes if plan else 0
    return Compiled(compiled, seconds, memory)


def measure(function: Callable[..., object], *arguments: object, runs: int) -> Timing:
    """Compiles `function` for `arguments` and times `runs` groups of calls after a warm-up."""
    return measure_compiled(compile_for(function, *arguments), *arguments, runs=runs)


def measure_compiled(
    compiled: Compiled, *arguments: object, runs: int, group_seconds: float | None = None
) -> Timing:
    """Times `runs` groups of calls of a compiled function after a warm-up.

    Args:
      compiled: from `compile_for`.
      *arguments: of each call.
      runs: groups, at least 2.
      group_seconds: how long a group lasts at least; None: `GROUP_SECONDS` on a GPU, 0 (groups of
        one call) elsewhere.
    """
    if runs < 2:
        raise ValueError(f"runs: expected at least 2, got {runs}")
    if group_seconds is None:
        group_seconds = GROUP_SECONDS if jax.default_backend() == "gpu" else 0.0

    def group(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = compiled.call(*arguments)
        jax.block_until_ready(result)
        return time.perf_counter() - start

    _, peak = call_and_peak(compiled, *arguments)
    group(2)
    calls = 1
    if group_seconds:
        # the first estimate has the launch and the wait in it, the second hardly
        calls = calls_for(group_seconds, group(1))
        calls = calls_for(group_seconds, group(calls) / calls)
    times = [group(calls) / calls for _ in range(runs)]
    low, median, high = statistics.quantiles(times, n=4)
    return Timing(median, high - low, compiled.seconds, compiled.memory, peak, calls)


def call_and_peak(compiled: Compiled, *arguments: object) -> tuple[Any, int | None]:
    """One call: its result, and its peak as in `Timing.peak`."""
    before = _memory_stats()
    result = jax.block_until_ready(compiled.call(*arguments))
    return result, _extra_peak(before, _memory_stats())


def calls_for(group_seconds: float, call_seconds: float) -> int:
    """How many calls of `call_seconds` last `group_seconds`; at least 1."""
    return max(1, math.ceil(group_seconds / max(call_seconds, 1e-6)))


def model_for_device() -> str:
    """The configuration whose step the present device can time."""
    return "smoke" if jax.default_backend() == "cpu" else "mdn_400m"


def how_timed(runs: int) -> str:
    """What the table's header says of the times."""
    if jax.default_backend() != "gpu":
        return f"median of {runs} runs ± half the distance of the quartiles, waiting for each"
    return (
        f"median of {runs} groups ± half the distance of the quartiles; a group is as many calls "
        f"as last {GROUP_SECONDS * 1e3:.0f} ms, without a wait between them"
    )


def milliseconds(timing: Timing) -> str:
    """The median and half the distance of the quartiles."""
    return f"{timing.median * 1e3:.3f} ± {timing.spread * 5e2:.3f}"


def _memory_stats() -> dict[str, int]:
    return jax.devices()[0].memory_stats() or {}


def _extra_peak(before: dict[str, int], after: dict[str, int]) -> int | None:
    peak = "peak_bytes_in_use"
    if peak not in after or after[peak] <= before[peak]:
        return None
    return after[peak] - before["bytes_in_use"]
