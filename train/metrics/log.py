"""What a run says while it runs: a JSONL file and a progress bar."""

import contextlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

from tqdm import tqdm

from mdn_jax.errors import RunError
from mdn_jax.new_file import write_text
from train.checkpointing.run_directory import way_on
from train.metrics.writers import Writer

Record = dict[str, int | float | None]

_MUCH = 0.05  # of the time without data, to be said
_PLAIN_SECONDS = 15.0  # between lines where there is no terminal


class MetricsLog:
    """A file of one JSON object a line, each with its `step`.

    A run that resumes at a step keeps the lines up to it and drops those after it, so that every
    step is there once. Lines that a bad disk or editor left without a record are left out, and the
    file as it was is kept beside.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume_step: int,
        writes: bool = True,
        others: Callable[[], Sequence[Writer]] = list,
    ) -> None:
        """Opens the file.

        Args:
          path: file to write.
          resume_step: last step to keep lines of; 0 starts an empty file.
          writes: False for all processes of a run but one; what they are given goes nowhere.
          others: opens what gets the same values, where it writes.

        Raises:
          RunError: a file that cannot be read or written.
        """
        self._path, self._others = path, list[Writer]()
        self._file: IO[str] | None = None
        if not writes:
            self.records: list[Record] = []
            return
        self.records = self._kept(resume_step) if resume_step else []
        with self._writing():
            write_text(path, "".join(json.dumps(record) + "\n" for record in self.records))
            self._file = path.open("a", encoding="utf-8")
        self._others = list(others())

    def _kept(self, resume_step: int) -> list[Record]:
        metrics = scan_metrics(self._path)
        if metrics.broken:
            copy = self._path.with_name(f"{self._path.name}.damaged")
            taken = len(list(copy.parent.glob(f"{copy.name}*")))
            copy = copy.with_name(f"{copy.name}.{taken}") if taken else copy
            with self._writing():
                shutil.copy2(self._path, copy)
            print(f"{metrics.describe(self._path)}; the file as it was is {copy}")
        return [record for record in metrics.records if (record["step"] or 0) <= resume_step]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"output_dir: expected to write to {self._path}, got: {error.strerror}; "
                f"{way_on(self._path.parent)}"
            ) from None

    def write(self, **values: int | float) -> None:
        """Appends a line; a number that is not finite becomes null.

        Raises:
          RunError: a file that cannot be written.
        """
        record: Record = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self.records.append(record)
        if self._file is not None:
            with self._writing():
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()
        finite = {k: v for k, v in values.items() if k != "step" and math.isfinite(v)}
        for other in self._others:
            other.write(int(values["step"]), finite)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a full disk, which was said before
                self._file.close()
        for other in self._others:
            other.close()


class Metrics(NamedTuple):
    """What is in a metrics file.

    Attributes:
      records: the good lines, in their order.
      broken: numbers of the others, from 1; without a last line that a crash cut short.
    """

    records: list[Record]
    broken: list[int]

    def describe(self, path: Path) -> str:
        """What was left out of a file, in one line."""
        count, first = len(self.broken), self.broken[0]
        return f"left out of {path}: {count} line(s) that are no record, the first is line {first}"


def read_metrics(path: Path) -> list[Record]:
    """The good lines of a metrics file, as of `scan_metrics`."""
    return scan_metrics(path).records


def scan_metrics(path: Path) -> Metrics:
    """The lines of a metrics file; none, if there is no such file.

    Raises:
      RunError: a file that cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise RunError(f"{path.name}: expected to read {path}, got: {error.strerror}") from None
    metrics = Metrics([], [])
    for number, line in enumerate(lines, 1):
        try:
            metrics.records.append(_record(line))
        except (ValueError, OverflowError, RecursionError):
            if line.strip() and number < len(lines):  # the last has no end: it was being written
                metrics.broken.append(number)
    return metrics


def _record(line: bytes) -> Record:
    record = json.loads(line)
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise ValueError("not an object with a step")
    for value in record.values():
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise ValueError("not a number or null")
    return record


class Progress:
    """A bar with loss, tokens/s and time left; sparse plain lines where there is no terminal."""

    def __init__(self, *, start: int, steps: int, shown: bool = True) -> None:
        """Shows the bar.

        Args:
          start: steps taken before.
          steps: steps at the end.
          shown: False for all processes of a run but one.
        """
        self._shown = shown
        self._terminal = shown and sys.stderr.isatty()
        columns, lines = shutil.get_terminal_size()  # 80 by 24 where the terminal names no size
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=not self._terminal,
            ncols=columns,
            nrows=lines,
        )
        self._steps, self._first = steps, start + 1
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def advance(self) -> None:
        """Counts a step."""
        self._bar.update()

    def report(
        self, step: int, loss: float, tokens_per_second: float, data_wait: float = 0.0
    ) -> None:
        """Shows a step: loss in nats/token, speed, share of the time that it waited for data."""
        speed = f"{tokens_per_second:,.0f} tokens/s"
        if data_wait >= _MUCH:
            speed += f", {data_wait:.0%} of the time waiting for data"
        self._bar.set_postfix_str(f"loss {loss:.3f}, {speed}")
        now = time.monotonic()
        if step == self._first:  # compiled until now: says nothing about the time left
            self._began = self._said = now
        if self._terminal or now - self._said < _PLAIN_SECONDS:
            return
        self._said = now
        left = (now - self._began) / (step - self._first) * (self._steps - step)
        self.say(f"step {step}/{self._steps}  loss {loss:.3f}  {speed}  {left / 60:.1f} min left")

    def say(self, line: str) -> None:
        """Prints a line without disturbing the bar."""
        if self._shown:
            self._bar.write(line, file=sys.stderr)
