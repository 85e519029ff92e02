"""Prompts on their way into their slots: pieces of several in one call of the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jaxtyping import Array

from mdn_jax.models import GenerationState
from mdn_jax.serving.device import Device, Part
from mdn_jax.serving.jobs import Job
from mdn_jax.serving.prefixes import SHARED, PrefixCache, common_length


@dataclass(eq=False)
class Reading:
    """A prompt that is read, piece by piece, into the slot that is kept for it."""

    job: Job
    slot: int
    state: GenerationState | None  # that the first piece goes on from, until it is in the slot
    at: int
    marks: list[int]  # where a state is kept, ascending, behind `at`; the last is the end
    begun: bool = False  # whether the slot has this text's state


class Reader:
    """Reads prompts. Where one is cut depends on itself and on what is kept, not on the others.

    Args:
      device: the model and its rows.
      prefixes: states of prompts.
    """

    def __init__(self, device: Device, prefixes: PrefixCache) -> None:
        self._device, self._prefixes = device, prefixes
        self._readings: list[Reading] = []
        self._behind: dict[Job, Reading] = {}  # what prompts that share with it wait for
        self._keeps = prefixes.has_room(device.empty)
        self._last_call: Array | None = None

    def __len__(self) -> int:
        return len(self._readings)

    def begin(self, job: Job, slot: int) -> bool:
        """Begins with a prompt, unless one that is being read will leave a state for it."""
        if self._behind.get(job) in self._readings:
            return False
        size, piece = len(job.prompt), self._device.piece
        state, count, branch = None, 0, 0
        if not job.score_prompt:
            count, state, branch = self._prefixes.find(job.prompt)
            before = self._shares(job.prompt, count) if self._keeps else None
            if before is not None:
                self._behind[job] = before
                return False
        self._behind.pop(job, None)
        job.cached = count
        whole = (size - 1) // piece * piece
        marks = sorted({mark for mark in (branch, whole, size) if count < mark})
        self._readings.append(Reading(job, slot, state, count, marks))
        return True

    def drop(self, job: Job) -> None:
        """Stops reading a prompt, or waiting with it."""
        self._behind.pop(job, None)
        self._readings = [reading for reading in self._readings if reading.job is not job]

    def clear(self) -> None:
        """Stops reading all of them."""
        self._readings, self._behind = [], {}

    def slots(self) -> set[int]:
        """Of the prompts that are being read."""
        return {reading.slot for reading in self._readings}

    def read(self) -> tuple[int, list[Reading]]:
        """One call of the model: the oldest prompt's piece, and others of its padded size.

        Returns:
          The tokens of the call, padding included, 0 where there is nothing to read; and the
          prompts that have been read.
        """
        if not self._readings:
            return 0, []
        oldest = self._readings[0]
        if not oldest.marks:  # all of it was kept
            together, used = [oldest], 1
            self._place(oldest)
        elif oldest.job.score_prompt:
            together, used = [oldest], self._device.piece
            self._score(oldest)
        else:
            size = self._device.padded(self._end(oldest) - oldest.at)
            rows = self._device.rows_of(size)
            together, used = self._alike(size)[:rows], rows * size
            self._read(together, size)
        done = [reading for reading in together if not reading.marks]
        self._readings = [reading for reading in self._readings if reading not in done]
        return used, done

    def _shares(self, prompt: Sequence[int], count: int) -> Reading | None:
        """What is being read and has more in common with a prompt than is kept of it."""
        for reading in self._readings:
            if common_length(prompt, reading.job.prompt) - count >= SHARED:
                return reading
        return None

    def _alike(self, size: int) -> list[Reading]:
        """Those whose next piece has this size, padded: a piece is always in the same program."""

        def fits(reading: Reading) -> bool:
            count = self._end(reading) - reading.at if reading.marks else 0
            return count > 0 and self._device.padded(count) == size

        return [x for x in self._readings if not x.job.score_prompt and fits(x)]

    def _end(self, reading: Reading) -> int:
        """Where the next piece ends: where a state is kept at most."""
        piece = self._device.piece
        return min((reading.at // piece + 1) * piece, reading.marks[0])

    def _place(self, reading: Reading) -> None:
        """Puts the state that was kept into the slot."""
        if reading.state is not None:
            self._device.place(reading.slot, reading.state)
            reading.state, reading.begun = None, True

    def _read(self, together: Sequence[Reading], size: int) -> None:
        parts = []
        for reading in together:
            self._place(reading)
            tokens = reading.job.prompt[reading.at : self._end(reading)]
            parts.append(Part(reading.slot, tokens, not reading.begun))
        self._called(self._device.read(parts, size))
        for reading in together:
            self._advance(reading)

    def _score(self, reading: Reading) -> None:
        job, at, end = reading.job, reading.at, self._end(reading)
        tokens = job.prompt[at:end]
        following = [*job.prompt[at + 1 : end + 1], 0][: len(tokens)]
        part = Part(reading.slot, tokens, not reading.begun)
        position, scores = self._device.score(part, following)
        job.scored.append((len(tokens), scores))
        self._called(position)
        self._advance(reading)

    def _called(self, position: Array) -> None:
        """Waits where two calls are ahead of the device."""
        if self._last_call is not None:
            jax.block_until_ready(self._last_call)
        self._last_call = position

    def _advance(self, reading: Reading) -> None:
        end = self._end(reading)
        reading.at, reading.begun = end, True
        if end == reading.marks[0]:
            reading.marks.pop(0)
            if self._keeps:
                prompt = reading.job.prompt[:end]
                self._prefixes.put(prompt, self._device.take(reading.slot))
