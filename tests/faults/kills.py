"""Runs that are killed again and again, and still end as one that never was."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.common import Attempt, Place, difference, last_state
from tests.train.parallel.processes import start

BEFORE, WHEN, COMMAND = (
    "kill -9 before a change of the run's directory",
    "kill -9 at any time",
    "kill -9 of a command that starts",
)
# the chances of each; the whole command takes seconds to start
_WAYS = {BEFORE: 10, WHEN: 6, COMMAND: 4}
_CHANGES, _SECONDS = 60, 4.0  # a bit less than what a run has of both
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_PATIENCE = 300.0


def attack(place: Place, rng: random.Random, *, kills: int) -> Iterator[Attempt]:
    """Kills a run, goes on with it and kills it again, until it is through; then another."""
    right, done, ways = last_state(place.run), 0, list(_WAYS)
    while done < kills:
        directory, killed = place.work() / "run", list[tuple[str, str]]()
        while True:
            way = rng.choices(ways, list(_WAYS.values()))[0] if done < kills else None
            what, status, words = _go_on(place, directory, way, rng)
            if way is None or status != -signal.SIGKILL:
                break
            killed.append((way, what))
            done += 1
        failure = None if status == 0 else f"status {status} in the end: {words[-500:]!r}"
        try:
            failure = failure or difference(last_state(directory), right)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        story = "; ".join(what for _, what in killed)
        for kind, what in killed:  # which of them it was is not known
            yield Attempt(kind, f"{what}, of one run with: {story}", failure)


def _go_on(
    place: Place, directory: Path, way: str | None, rng: random.Random
) -> tuple[str, int | None, str]:
    """Starts the run or goes on with it; returns what was done to it, its status and its words."""
    arguments, output = place.train(directory), directory.with_suffix(".txt")
    if any(path.name.isdecimal() for path in (directory / "checkpoints").glob("*")):
        arguments.append("--resume")
    if way == COMMAND:
        delay = rng.uniform(0.05, 6)
        with output.open("w") as file:
            command = [sys.executable, "-m", "train", *arguments]
            process = subprocess.Popen(command, stdout=file, stderr=file)
            try:
                status = process.wait(delay)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
        return f"after {delay:.3f} s of the command", status, output.read_text()
    change = rng.randrange(1, _CHANGES) if way == BEFORE else None
    fault = None if change is None else partial(die_before, directory, change)
    child = start(arguments, output, place.cache, fault)
    what = f"before change {change} of its files"
    if way == WHEN:
        delay = rng.uniform(0, _SECONDS)
        what = f"{delay:.3f} s after its start"
        child.join(delay)
        child.kill()
    child.join(_PATIENCE)
    status = child.exitcode
    if status is None:  # it hangs
        child.kill()
        child.join()
    return what, status, output.read_text() if output.exists() else ""


def die_before(directory: Path, number: int) -> None:
    """Has this process killed before its n-th change of the files under a directory.

    Changes are those that Python makes: new and written files, renames, removals.
    """
    changes = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event == "open":
            if not isinstance(arguments[2], int) or not arguments[2] & _WRITES:
                return
        elif event not in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"):
            return
        if str(directory) in str(arguments[0]):
            changes += 1
            if changes == number:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)  # it is on its way

    sys.addaudithook(watch)
