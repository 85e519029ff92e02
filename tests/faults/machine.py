"""What the machines do: hosts that differ, disks that are full, two runs in one directory."""

import contextlib
import random
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.faults.common import Attempt, NotTriedError, Place, difference, last_state, wrong_words
from tests.train.parallel.processes import Pair, start
from train.run import Run

HOSTS, DISK, TWO = "hosts that differ", "a full disk", "two runs at once in one directory"
_PATIENCE = 300.0


def hosts(place: Place, rng: random.Random, *, quick: bool) -> Iterator[Attempt]:
    """Two processes of one run that do not have the same documents."""

    def fewer(directory: Path) -> None:
        for name in ("1.txt", "5.txt"):
            (directory / name).unlink()

    def others(directory: Path) -> None:
        text = (directory / "3.txt").read_text()
        (directory / "3.txt").write_text(text.replace("7", "8"))

    def renamed(directory: Path) -> None:
        (directory / "0.txt").rename(directory / "x.txt")
        (directory / "1.txt").write_text("another")

    for change in (fewer, others, renamed)[: 1 if quick else 3]:
        for changed in (0, 1)[: 1 if quick else 2]:
            work = place.work()
            shutil.copytree(place.corpus, work / "corpus")
            change(work / "corpus")
            files = [place.corpus, place.corpus]
            files[changed] = work / "corpus"
            pair = Pair(work, files, place.cache)
            try:
                statuses, lines = pair.ends()
            except AssertionError as error:
                statuses, lines = [], [str(error)]
            words = "python -m train: error: data.files: expected the same documents"
            right = statuses == [1, 1] and all(line.startswith(words) for line in lines)
            failure = None if right else f"{statuses} {lines}"
            if pair.metrics.exists():
                failure = failure or "steps were taken"
            yield Attempt(HOSTS, f"{change.__name__} files of process {changed}", failure)


def full_disk(place: Place, rng: random.Random, *, quick: bool) -> Iterator[Attempt]:
    """A disk with no room, or very little, when the first checkpoint is to be written."""
    right = last_state(place.run)
    for free in (0,) if quick else (0, 1 << 12, 1 << 14, 1 << 16, 1 << 17):
        work = place.work()
        disk, output = work / "disk", work / "output.txt"
        run = disk / "run"
        with small_disk(disk, megabytes=8):
            fill = partial(fill_when_measured, disk, free)
            child = start(place.train(run, steps=3), output, place.cache)
            child.join(_PATIENCE)
            child = start([*place.train(run), "--resume"], output, place.cache, fill)
            child.join(_PATIENCE)
            failure = _refused(child.exitcode, output, "No space left on device")
            with contextlib.suppress(OSError):
                (disk / "filler").unlink()
            child = start([*place.train(run), "--resume"], output, place.cache)
            child.join(_PATIENCE)
            if child.exitcode:
                failure = failure or f"then {child.exitcode}: {output.read_text()[-500:]!r}"
            failure = failure or difference(last_state(run), right)
        yield Attempt(DISK, f"{free} bytes left when the held-out loss is measured", failure)


def two_runs(place: Place, rng: random.Random, *, quick: bool) -> Iterator[Attempt]:
    """The same command twice: one of them runs as if it were alone."""
    right = last_state(place.run)
    for number in range(1 if quick else 4):
        work = place.work()
        run, outputs = work / "run", [work / "0.txt", work / "1.txt"]
        arguments = place.train(run)
        what = "both start at once"
        if number % 2:
            what = "both resume at once"
            child = start(place.train(run, steps=3), outputs[0], place.cache)
            child.join(_PATIENCE)
            arguments.append("--resume")
        children = [start(arguments, output, place.cache) for output in outputs]
        for child in children:
            child.join(_PATIENCE)
        loser = 0 if children[0].exitcode else 1
        failure = _refused(children[loser].exitcode, outputs[loser], "output_dir: expected")
        if children[1 - loser].exitcode != 0:
            failure = f"{[child.exitcode for child in children]}"
        yield Attempt(TWO, what, failure or difference(last_state(run), right))


def _refused(status: int | None, output: Path, words: str) -> str | None:
    text = output.read_text()
    said = "".join(f"{line}\n" for line in text.splitlines() if "error: " in line)
    if status == 0 or words not in said or "Traceback" in text:
        return f"status {status}, expected an error with {words!r}: {text[-700:]!r}"
    return wrong_words(status, said)


@contextlib.contextmanager
def small_disk(directory: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own, where one may be mounted."""
    directory.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(directory)]
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        raise NotTriedError("needs the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill_when_measured(disk: Path, free: int) -> None:
    """Has this process find its disk full, but for some bytes, at the next held-out loss."""
    initialise = Run.__init__

    def filling(self, *arguments, **options):  # type: ignore[no-untyped-def]
        initialise(self, *arguments, **options)
        measure = self.evaluate

        def measured(params):  # type: ignore[no-untyped-def]
            filler = disk / "filler"
            with contextlib.suppress(OSError), filler.open("wb", 0) as file:
                while True:
                    file.write(bytes(4096))
            with filler.open("r+b") as file:
                file.truncate(max(0, filler.stat().st_size - free))
            return measure(params)

        self.evaluate = measured

    Run.__init__ = filling  # type: ignore[method-assign]
