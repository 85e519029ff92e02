"""What attacks share: a finished run, commands in this process, what counts as an answer."""

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.text.helpers import write_bpe
from tests.train.parallel.processes import start, tiny_flags

STEPS, MORE_STEPS = 8, 9
_LIMIT = 120  # seconds for a command on a busy machine


class Attempt(NamedTuple):
    """One attack.

    Attributes:
      kind: row of the table.
      what: was done, for whoever repeats it.
      failure: what should not have come; None: it was survived.
    """

    kind: str
    what: str
    failure: str | None


class NotTriedError(Exception):
    """An attack that this machine does not allow."""


class Answer(NamedTuple):
    """What a command said."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Place:
    """The directory of a campaign, with what all attacks begin with.

    Attributes:
      root: of everything; `run` in it is a finished run.
    """

    root: Path

    @property
    def cache(self) -> Path:
        return self.root / "compiled"

    @property
    def corpus(self) -> Path:
        return self.root / "corpus"

    @property
    def run(self) -> Path:
        return self.root / "run"

    def work(self) -> Path:
        """A new directory."""
        return Path(tempfile.mkdtemp(dir=self.root))

    def train(self, output: Path, **changes: Any) -> list[str]:
        """Arguments of `python -m train` for the run of this campaign in another directory."""
        changes = {"steps": STEPS, "checkpoint_every": 1, "keep_checkpoints": 1} | changes
        files = str(self.corpus / "*.txt")
        arguments = tiny_flags(files, output, **changes)
        arguments += ["--model.vocab-size", "300", "--data.tokenizer", str(self.root / "bpe")]
        return [*arguments, "--optimizer.decay-steps", str(STEPS)]

    def prepare(self) -> None:
        """Writes documents and a tokenizer, and makes the run."""
        self.corpus.mkdir()
        rng = random.Random(0)
        for i in range(8):
            lines = [f"x{rng.randrange(99)} = {rng.randrange(99)}" for _ in range(20)]
            (self.corpus / f"{i}.txt").write_text("\n".join(lines))
        write_bpe(self.root / "bpe")
        process = start(self.train(self.run), self.root / "run.txt", self.cache)
        process.join()
        if process.exitcode:
            raise RuntimeError((self.root / "run.txt").read_text())


def call(
    main: Callable[[Sequence[str]], int], arguments: Sequence[str], *, limit: int = _LIMIT
) -> Answer:
    """Runs a command in this process; libraries of C are heard too.

    An exception that gets out of it has status -1, as has a command that does not end in time.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with _said_to(out.fileno(), err.fileno()), _alarm(limit):
            try:
                status = main(arguments)
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except Exception as error:
                print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
                status = -1
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(os.read(file.fileno(), 1 << 24).decode(errors="replace"))
    return Answer(status, *texts)


def wrong_words(status: int | None, err: str) -> str | None:
    """What is wrong with how a command ended; None: status 0, or one line with status 1 or 2.

    The lines that follow it may only be those of a list, which are indented.
    """
    if "Traceback" in err:
        return f"status {status}, a traceback: {err[-500:]!r}"
    if status == 0:
        return None
    lines = [line for line in err.splitlines() if not line.startswith("  ")]
    if status not in (1, 2) or len(lines) != 1 or ": error: " not in lines[0]:
        return f"status {status}, expected one line of an error and 1 or 2: {err[-500:]!r}"
    return None


def last_state(directory: Path) -> dict[str, Any]:
    """The state, data position and metrics that a run ended with, by readers of others."""
    checkpoints = directory / "checkpoints"
    step = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore((checkpoints / str(step) / "state").absolute())
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {
        "step": step,
        "state": {
            jax.tree_util.keystr(path): np.asarray(x).tobytes()
            for path, x in jax.tree_util.tree_leaves_with_path(state)
        },
        "position": (checkpoints / str(step) / "data" / "metadata").read_text(),
        "losses": [(r["step"], r["loss"]) for r in records if "loss" in r],
        "held-out losses": [(r["step"], r["held_out_loss"]) for r in records if "loss" not in r],
        "sample": (directory / "sample.txt").read_text(),
    }


def difference(got: Mapping[str, Any], right: Mapping[str, Any]) -> str | None:
    """In what two results differ, if they do."""
    wrong = [name for name in right if got.get(name) != right[name]]
    return f"another result in silence: {', '.join(wrong)}" if wrong else None


def files_of(directory: Path) -> dict[str, bytes]:
    """All files under a directory, by their paths in it."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@contextlib.contextmanager
def _said_to(out: int, err: int) -> Iterator[None]:
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(number) for number in (1, 2)]
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in zip((1, 2), before, strict=True):
            os.dup2(old, number)
            os.close(old)


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> NoReturn:
        raise RuntimeError(f"did not end within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
