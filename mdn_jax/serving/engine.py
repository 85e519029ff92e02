"""Continuous batching: one thread that owns the device, and texts that come and go at any token."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from mdn_jax.models import Block
from mdn_jax.serving.device import Device, Start
from mdn_jax.serving.jobs import End, Event, Job
from mdn_jax.serving.limits import Limits
from mdn_jax.serving.metrics import Metrics
from mdn_jax.serving.prefixes import PrefixCache
from mdn_jax.serving.reading import Reader, Reading
from mdn_jax.serving.scores import NOT_FINITE, block_scores, with_prompt

log = logging.getLogger(__name__)

Status = Literal["starting", "ready", "draining", "ended", "failed"]

_QUICK = 4
"""Most tokens of a row in a block while prompts are waiting to be read."""


class QueueFullError(Exception):
    """More texts wait than may."""


class NotReadyError(Exception):
    """The engine takes no texts: it has not begun, or is ending."""


class _Flight(NamedTuple):
    """A block that the device works on, and whose rows it has."""

    block: Block
    owners: list[tuple[int, Job]]


class Engine:
    """Makes texts, each as if it were alone.

    Between two blocks of decoding at most one piece of prompts is read, so that running streams go
    on. While the device works on a block the tokens of the one before are handed out.

    Args:
      device: the model and its rows; from `start` on it belongs to the engine's thread.
      limits: how many texts wait at most.
      prefixes: states of prompts.
      prefix_dir: where these are read from at the start and written to at the end; None: nowhere.
      metrics: what is counted.

    Attributes:
      status: what it does.
      run_soon: calls a function in the thread of those who receive events; here and now unless set.
    """

    def __init__(
        self,
        device: Device,
        limits: Limits,
        prefixes: PrefixCache,
        *,
        prefix_dir: Path | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.status: Status = "starting"
        self.run_soon: Callable[[Callable[[], None]], Any] = lambda function: function()
        self.device = device
        self.metrics = metrics or Metrics()
        self.metrics.slots.set(device.slots)
        self.metrics.state.set(device.state_bytes)
        self._limits, self._prefixes, self._prefix_dir = limits, prefixes, prefix_dir
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._launcher = ThreadPoolExecutor(1, "launcher")
        # of both threads, under the lock
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._closing = False
        # of the engine's thread
        self._slots: list[Job | None] = [None] * device.slots
        self._reader = Reader(device, prefixes)
        self._events: list[tuple[Job, Event]] = []

    def start(self) -> None:
        """Begins: compiles, reads the kept states, and is ready."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Takes all of some texts, or none.

        Raises:
          NotReadyError: it is not ready.
          QueueFullError: more would wait than may.
        """
        with self._changed:
            if self.status != "ready":
                raise NotReadyError(self.status)
            free = self._slots.count(None)
            if len(self._waiting) + len(jobs) > self._limits.queue + free:
                raise QueueFullError
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Ends a text; its slot is free at the next block."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Texts that wait for a slot."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Texts that have a slot."""
        return len(self._slots) - self._slots.count(None)

    def drain(self) -> None:
        """Takes no more texts; those that are there go on."""
        with self._changed:
            if self.status in ("starting", "ready"):
                self.status = "draining"

    def close(self, timeout: float | None = None) -> None:
        """Ends the texts that are still there and the thread; the states are written."""
        self.drain()
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            self._begin()
            flight: _Flight | None = None
            while self._wait(flight):
                flight = self._turn(flight)
            self._end("ended", "cancelled", "the server is ending")
            if self._prefix_dir is not None:
                self._prefixes.save(self._prefix_dir, self.device.model)
        except Exception as error:  # of the device: whoever waits has to hear of it
            log.exception("the engine has failed")
            self._end("failed", "error", f"the engine has failed: {error}")
        finally:
            self._launcher.shutdown()

    def _begin(self) -> None:
        began = time.monotonic()
        self.device.warm()
        if self._prefix_dir is not None:
            self._prefixes.load(self._prefix_dir, self.device.model, self.device.fit)
        log.info("ready after %.1f s", time.monotonic() - began)
        with self._changed:
            if self.status == "starting":
                self.status = "ready"

    def _wait(self, flight: _Flight | None) -> bool:
        """Waits until there is something to do; False: it is to end."""
        with self._changed:
            busy = flight is not None or self.active > 0
            while not (busy or self._waiting or self._closing):
                self._changed.wait()
            return not self._closing

    def _turn(self, flight: _Flight | None) -> _Flight | None:
        """Sends the next block off, hands out what `flight` brings, reads a piece of prompts.

        A loop whose end the device decides may hold up who starts it until it ends. So it is
        started in a thread of its own.
        """
        passed = self.metrics.turn()
        self._expire()
        read = self._reader.slots()
        taken = [(slot, job) for slot, job in enumerate(self._slots) if job is not None]
        owners = [(slot, job) for slot, job in taken if slot not in read]
        started = None
        if owners:
            quick = bool(self._waiting) and None in self._slots
            scored = any(job.logprobs is not None for _, job in owners)
            count = _QUICK if quick or read else self.device.block
            started = self._launcher.submit(self.device.decode, count, logprobs=scored)
        passed("begin")
        if flight is not None:
            jax.block_until_ready(flight.block.counts)
            passed("wait")
            self._land(flight)
        self._hand_out()
        self._begin_reading()
        passed("tell")
        following = None if started is None else _Flight(started.result(), owners)
        passed("launch")
        self._read(passed)
        self._hand_out()
        self._measure()
        passed("admit")
        return following

    def _expire(self) -> None:
        """Ends the texts that nobody waits for any more."""
        with self._changed:
            gone = [job for job in self._waiting if job.cancelled or job.late]
            for job in gone:
                self._waiting.remove(job)
        gone += [job for job in self._slots if job and (job.cancelled or job.late)]
        for job in gone:
            if job in self._slots:
                self.device.stop(self._slots.index(job))
            self._reader.drop(job)
            self._finish(job, Event(end="cancelled" if job.cancelled else "timeout"))

    def _read(self, passed: Callable[[str], None]) -> None:
        """Reads prompts of about one piece altogether."""
        left = self.device.piece
        while left > 0:
            self._begin_reading()
            used, done = self._reader.read()
            passed("read")
            if not used:
                return
            left -= used
            self._admit(done)
            passed("admit")

    def _begin_reading(self) -> None:
        """Gives free slots to prompts that wait, in their order."""
        with self._changed:
            waiting = list(self._waiting)
        for job in waiting:
            if None not in self._slots:
                return
            slot = self._slots.index(None)
            if self._reader.begin(job, slot):
                with self._changed:
                    self._waiting.remove(job)
                    self._slots[slot] = job

    def _admit(self, done: Sequence[Reading]) -> None:
        """Prompts that were read become rows."""
        starts = []
        for reading in done:
            job = reading.job
            if job.max_tokens:
                how = job.sampling, job.seed, job.stop_tokens
                starts.append(Start(reading.slot, job.max_tokens, *how))
            else:
                self._finish(job, with_prompt(job, Event(end="length")))
        self.device.begin(starts)

    def _land(self, flight: _Flight) -> None:
        """What a block has made, to those who wait for it."""
        block = flight.block
        tokens, counts, ended, logprobs = jax.device_get(
            (block.tokens, block.counts, block.ended, block.logprobs)
        )
        now = time.monotonic()
        for slot, job in flight.owners:
            count = int(counts[slot])
            if job.ended or not count:
                continue
            new = tokens[slot, :count].tolist()
            if job.first is None:
                job.first = now
            job.made += count
            end: End | None = None
            message = ""
            if new[-1] < 0:
                end, new, message = "error", new[:-1], NOT_FINITE
            elif ended[slot]:
                end = "stop"
            elif job.made >= job.max_tokens:
                end = "length"
            scores = None
            if job.logprobs is not None:
                scores = block_scores(logprobs, slot, len(new), job)
            event = with_prompt(job, Event(new, scores, None, end, message))
            if event.end is None:
                self._events.append((job, event))
            else:
                self._finish(job, event)

    def _finish(self, job: Job, event: Event) -> None:
        job.ended = True
        if job in self._slots:
            self._slots[self._slots.index(job)] = None
        assert event.end is not None
        self.metrics.count_end(job, event.end, time.monotonic())
        self._events.append((job, event))

    def _hand_out(self) -> None:
        if self._events:
            events, self._events = self._events, []
            try:
                self.run_soon(partial(_give, events))
            except RuntimeError:  # the loop of those who waited is closed
                log.warning("nobody waits for %d events", len(events))

    def _measure(self) -> None:
        self.metrics.active.set(self.active)
        self.metrics.waiting.set(self.waiting)
        self.metrics.prefixes.set(len(self._prefixes))
        self.metrics.prefix_bytes.set(self._prefixes.size)

    def _end(self, status: Status, end: End, message: str) -> None:
        """Ends all texts that are there."""
        with self._changed:
            self.status = status
            jobs = [*self._waiting, *(job for job in self._slots if job is not None)]
            self._waiting.clear()
        self._reader.clear()
        for job in jobs:
            self._finish(job, Event(end=end, message=message))
        self._hand_out()
        self._measure()


def _give(events: Sequence[tuple[Job, Event]]) -> None:
    for job, event in events:
        job.receive(event)
