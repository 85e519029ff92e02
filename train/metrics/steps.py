"""The metrics of steps, read one step behind, and their speed."""

import time
from collections.abc import Callable
from typing import NamedTuple

from train.config import TrainConfig
from train.data.batches import Batches
from train.guard import raise_refused
from train.metrics.log import MetricsLog, Progress
from train.metrics.utilization import Monitor
from train.step import StepMetrics, scalars


class Pace:
    """Tokens a second, from the end of one step to the end of another.

    A step ends when its metrics are there. Where the next one was dispatched before, the device
    does not wait for the host in between, and its own time is what is measured.

    Attributes:
      seconds: of the steps since `take`.
      steps: as many.
    """

    def __init__(
        self, tokens_per_step: int, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Starts the clock.

        Args:
          tokens_per_step: over all devices.
          clock: in seconds.
        """
        self._tokens, self._clock = tokens_per_step, clock
        self.seconds, self.steps = 0.0, 0
        self.start()

    def start(self) -> None:
        """What was since the last step's end does not count: an evaluation, a checkpoint."""
        self._since = self._clock()

    def ended(self) -> float:
        """Counts a step that has just ended; returns its seconds."""
        before, self._since = self._since, self._clock()
        self.seconds, self.steps = self.seconds + self._since - before, self.steps + 1
        return self._since - before

    def take(self) -> float:
        """Tokens a second of the steps so far; then begins anew."""
        speed = self.steps * self._tokens / max(self.seconds, 1e-9)
        self.seconds, self.steps = 0.0, 0
        return speed


class _Pending(NamedTuple):
    step: int
    metrics: StepMetrics
    logged: bool


class StepReports:
    """Reads the metrics of each step when the next one is dispatched; writes and shows them.

    So the device always has a step to go on with, and a run is one step ahead of what is known of
    it, no more.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        batches: Batches,
        epochs: dict[str, float],
        monitor: Monitor,
        log: MetricsLog,
        progress: Progress,
    ) -> None:
        """Starts the clock.

        Args:
          config: of the run.
          batches: what the steps wait for.
          epochs: that a step takes of the documents, by the name of the metric.
          monitor: of speed and memory.
          log: to write to.
          progress: to show the steps.
        """
        self._config, self._batches, self._epochs = config, batches, epochs
        self._monitor, self._log, self._progress = monitor, log, progress
        self._pending: _Pending | None = None
        self._waited = 0.0
        self._pace = Pace(config.tokens_per_step)

    def before(self, step: int) -> None:
        """A step is about to be dispatched: starts the trace where it begins with this one."""
        if self._monitor.begins(step):
            self.finish()
            self._monitor.start()
            self.go_on()

    def add(self, step: int, metrics: StepMetrics, *, logged: bool) -> None:
        """A step was dispatched: waits for the one before it.

        Args:
          step: its number.
          metrics: of the step, not there yet.
          logged: whether they are written.

        Raises:
          DivergedError: the one before ended the run.
        """
        self._read()
        self._pending = _Pending(step, metrics, logged)
        self._progress.advance()
        if self._monitor.ends(step):
            self.finish()
            self._monitor.stop()
            self.go_on()

    def finish(self) -> None:
        """Waits for the last step that was dispatched; raises as `add`."""
        self._read()

    def go_on(self) -> None:
        """The time since `finish` is none of the steps'."""
        self._pace.start()

    def _read(self) -> None:
        if self._pending is None:
            return
        (step, metrics, logged), self._pending = self._pending, None
        values = scalars(metrics)
        self._pace.ended()
        if logged:
            self._write(step, {x: y for x, y in values.items() if x != "spike"})
        raise_refused(
            self._config.guard,
            step=step,
            spike=bool(values["spike"]),
            refused=int(values["refused"]),
            loss=values["loss"],
            grad_norm=values["grad_norm"],
        )

    def _write(self, step: int, values: dict[str, float]) -> None:
        seconds, waited = self._pace.seconds, self._batches.waited
        data_wait = round(min((waited - self._waited) / seconds, 1.0), 5)
        speed, self._waited = self._pace.take(), waited
        values |= {"tokens_per_second": round(speed), "data_wait": data_wait}
        values |= self._monitor.values(speed)
        values |= {name: round(step * x, 5) for name, x in self._epochs.items()}
        self._log.write(step=step, **values)
        self._progress.report(step, values["loss"], speed, data_wait)
