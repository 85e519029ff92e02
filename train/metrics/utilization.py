"""What a run's steps cost: share of the devices' peak, memory, a trace."""

from pathlib import Path
from typing import Any, Self

import jax

from train.config import TrainConfig
from train.metrics.flops import flops_per_token, utilisation

PROFILE_DIRECTORY = "profile"
FIRST_TRACED, TRACED = 3, 3  # after the steps that compile and warm up


class Monitor:
    """Speed and memory of the steps of one process, and their trace.

    Args:
      config: of the run.
      params: of the model, or their shapes.
      devices: of the mesh.
      start: steps taken before.
      traces: whether `config.profile` is this process's to follow.
    """

    def __init__(
        self,
        config: TrainConfig,
        params: Any,
        devices: list[jax.Device],
        *,
        start: int,
        traces: bool,
    ) -> None:
        self._flops = flops_per_token(config.model, params, config.sequence_length)
        self._kind, self._count = devices[0].device_kind, len(devices)
        self._local = [d for d in devices if d.process_index == jax.process_index()]
        self._trace_to: Path | None = None
        if config.profile and traces:
            self._trace_to = config.directory / PROFILE_DIRECTORY
        self._first = min(start + FIRST_TRACED, config.steps)
        self._tracing = False

    def values(self, tokens_per_second: float) -> dict[str, float]:
        """Metrics that belong to a speed over all devices.

        `mfu`, from 0 to 1, for known devices; `memory_gb` and `peak_memory_gb` of the fullest
        device of this process, where devices count their memory.
        """
        values: dict[str, float] = {}
        used = utilisation(tokens_per_second * self._flops, self._kind, self._count)
        if used is not None:
            values["mfu"] = round(used, 4)
        stats = [s for s in (d.memory_stats() for d in self._local) if s]
        if stats:
            values["memory_gb"] = max(s["bytes_in_use"] for s in stats) / 1e9
            values["peak_memory_gb"] = max(s["peak_bytes_in_use"] for s in stats) / 1e9
        return values

    def begins(self, step: int) -> bool:
        """Whether the trace begins with this step."""
        return self._trace_to is not None and step == self._first

    def start(self) -> None:
        """Starts the trace."""
        if self._trace_to is not None:
            jax.profiler.start_trace(self._trace_to)
            self._tracing = True

    def ends(self, step: int) -> bool:
        """Whether the trace ends with this step."""
        return self._tracing and step == self._first + TRACED - 1

    def stop(self) -> None:
        """Ends the trace and writes it."""
        self._tracing = False
        jax.profiler.stop_trace()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            self.stop()
