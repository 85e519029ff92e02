"""Every file of a run's directory, damaged, through every command that reads one."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mdn_jax.cli import convert, evaluate, generate, inspect_checkpoint
from tests.faults.common import (
    MORE_STEPS,
    Answer,
    Attempt,
    Place,
    call,
    difference,
    files_of,
    last_state,
    wrong_words,
)
from tests.train.parallel.processes import compile_once
from train.cli import plot
from train.cli.train import main as train

BIT, CUT, EMPTY = _KINDS = (
    "a bit of a run's file flipped",
    "a run's file cut in half",
    "a run's file emptied",
)
METRICS = "metrics.jsonl"  # what it says is not under a digest: it may be edited, and is drawn

Reader = Callable[[Path, Path], tuple[Answer, dict[str, Any]]]


def attack(place: Place, rng: random.Random, *, part: int, quick: bool) -> Iterator[Attempt]:
    """Damages one file after another in a copy of the run.

    Args:
      place: of the campaign.
      rng: draws bits.
      part: 0 or 1: every other file, so that two processes share them.
      quick: each file damaged in one way, and read by two commands of six.
    """
    compile_once(str(place.cache))
    work = place.work()
    run, out = work / "run", work / "out"
    readers = _readers(place)

    def read(name: str, damage: Callable[[], object]) -> tuple[Answer, dict[str, Any], str | None]:
        for directory in (run, out):
            shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(place.run, run)
        out.mkdir()
        damage()
        before = files_of(run)
        answer, result = readers[name](run, out)
        resumes = name == "train --resume" and answer.status == 0
        lost = None if resumes or files_of(run) == before else "it changed the run's files"
        return answer, result, lost

    rights = {}
    for name in readers:
        answer, rights[name], lost = read(name, lambda: None)
        if answer.status != 0 or lost:
            raise RuntimeError(f"{name}, nothing damaged: {answer} {lost}")
    for number, file in enumerate(list(files_of(place.run))[part::2]):
        size = (place.run / file).stat().st_size
        for kind in [rng.choice(_KINDS)] if quick else (BIT, CUT, EMPTY):
            bit = rng.randrange(8 * size)
            what = f"{file}, bit {bit}" if kind == BIT else file
            for name in list(readers)[number % 3 :: 3] if quick else readers:
                answer, result, lost = read(name, partial(_damage, run / file, kind, bit))
                failure = wrong_words(answer.status, answer.err) or lost
                if failure is None and answer.status == 0:
                    failure = difference(result, _expected(file, rights[name]))
                yield Attempt(f"{kind}: {name}", what, failure)


def _damage(file: Path, kind: str, bit: int) -> None:
    data = bytearray(file.read_bytes())
    if kind == BIT:
        data[bit // 8] ^= 1 << bit % 8
    else:
        del data[len(data) // 2 if kind == CUT else 0 :]
    file.write_bytes(data)


def _expected(file: str, right: dict[str, Any]) -> dict[str, Any]:
    """What of a result may not change: of metrics without a digest, all but themselves."""
    of_metrics = {"losses", "held-out losses", "curves.png"} if file == METRICS else set()
    return {key: value for key, value in right.items() if key not in of_metrics}


def _readers(place: Place) -> dict[str, Reader]:
    """The commands by their names: on a run, writing to another directory."""
    text = str(place.corpus / "0.txt")

    def generated(run: Path, out: Path) -> tuple[Answer, dict[str, Any]]:
        options = ["--prompt", "x1 = ", "--max-new-tokens", "8"]
        answer = call(generate.main, [str(run), *options])
        return answer, {"text": answer.out}

    def evaluated(run: Path, out: Path) -> tuple[Answer, dict[str, Any]]:
        options = ["--files", text, "--window", "16", "--json"]
        answer = call(evaluate.main, ["perplexity", str(run), *options])
        values = json.loads(answer.out) | {"seconds": 0} if answer.status == 0 else {}
        return answer, values

    def exported(run: Path, out: Path) -> tuple[Answer, dict[str, Any]]:
        answer = call(convert.main, ["export", str(run), str(out / "folder")])
        return answer, files_of(out)

    def inspected(run: Path, out: Path) -> tuple[Answer, dict[str, Any]]:
        options = ["--files", text, "--row", "16", "--tokens", "32", "--window", "4"]
        answer = call(inspect_checkpoint.main, [str(run), *options, "--output-dir", str(out)])
        return answer, files_of(out)

    def plotted(run: Path, out: Path) -> tuple[Answer, dict[str, Any]]:
        answer = call(plot.main, [str(run), "--output", str(out / "curves.png")])
        return answer, files_of(out)

    def resumed(run: Path, out: Path) -> tuple[Answer, dict[str, Any]]:
        answer = call(
            train, [*place.train(run, steps=MORE_STEPS, checkpoint_every=MORE_STEPS), "--resume"]
        )
        return answer, last_state(run) if answer.status == 0 else {}

    return {
        "mdn-generate": generated,
        "mdn-eval perplexity": evaluated,
        "mdn-convert export": exported,
        "mdn-inspect": inspected,
        "train plot": plotted,
        "train --resume": resumed,
    }
