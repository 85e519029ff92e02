"""Folders of data that no program should trip over: what can be read is, the rest is named."""

import gzip
import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from mdn_jax.cli import evaluate, inspect_checkpoint
from tests.faults.common import Attempt, Place, call, wrong_words
from tests.text.helpers import TEXTS, write_hostile, write_jsonl, write_parquet
from tests.train.parallel.processes import compile_once
from train.cli import tokenize
from train.cli.train import main as train

UNREADABLE, ODD = "a folder with what nobody can read", "a folder with odd names, links, loops"
_LIMIT = 30  # seconds for a command; a pipe would keep it for ever

Command = Callable[[Path, Path], tuple[Callable[..., int], list[str]]]


def attack(place: Place, rng: random.Random, *, quick: bool) -> Iterator[Attempt]:
    """Lets every command that reads documents read each folder."""
    compile_once(str(place.cache))
    commands = _commands(place)
    work = place.work()
    for path in _unreadable(work / "data", rng):
        for name in commands:
            yield _attempt(place, name, path, path.name)
        if quick or not os.path.lexists(path):
            continue
        folder = place.work()  # the same file among good ones
        for good in ("0.txt", "z.txt"):
            (folder / good).write_text("good")
        path.rename(folder / path.name)
        for name in commands:
            yield _attempt(place, name, folder / "*", path.name)
    yield from _odd(place, rng)


def _attempt(place: Place, name: str, files: Path, bad: str) -> Attempt:
    """Has a command read files, one of which cannot be read and has to be named."""
    main, arguments = _commands(place)[name](files, place.work() / "out")
    answer = call(main, arguments, limit=_LIMIT)
    failure = wrong_words(answer.status, answer.err)
    if answer.status == 0:
        failure = failure or f"exit 0, {answer.out[-200:]!r}"
    elif not any(shown in answer.err for shown in (bad, ascii(bad)[1:-1])):
        failure = failure or f"the file is not named: {answer.err[-300:]!r}"
    return Attempt(UNREADABLE, f"{name} on {files}, with {bad!r}", failure)


def _unreadable(directory: Path, rng: random.Random) -> list[Path]:
    paths = write_hostile(directory)
    more = {
        "deep object.jsonl": b'{"a": ' * 99_999,
        "random\n.bin": bytes(rng.randrange(256) for _ in range(4096)) + b"\0",
        "random.jsonl": rng.randbytes(4096),
        "random.parquet": b"PAR1" + rng.randbytes(4096) + b"PAR1",
        "random.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 999)[:-9] + rng.randbytes(9),
        "huge number.jsonl": b'{"text": "a", "n": 1' + b"0" * 9999 + b"}",
    }
    for name, data in more.items():
        (directory / name).write_bytes(data)
    (directory / "loop.txt").symlink_to("loop.txt")
    (directory / "device.txt").symlink_to("/dev/zero")
    os.mkfifo(directory / "pipe.txt")
    here = os.getcwd()
    os.chdir(directory)  # the path of a socket may not be long
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("socket.txt")
    finally:
        os.chdir(here)
    added = [*more, "loop.txt", "device.txt", "pipe.txt", "socket.txt"]
    # empty files are left out where there are others
    return [path for path in paths if path.name != "empty.txt"] + [directory / n for n in added]


def _odd(place: Place, rng: random.Random) -> Iterator[Attempt]:
    """The same documents under plain names and under others give the same."""
    plain, odd = place.work(), place.work()
    for i, text in enumerate(TEXTS[:8]):
        (plain / f"{i}.txt").write_text(text)
    write_jsonl(plain / "8.jsonl", TEXTS[8:16])
    write_parquet(plain / "9.parquet", TEXTS[16:24])
    inside = odd / "a folder [x]" / "ü\n'\" *?"
    inside.mkdir(parents=True)
    names = [b"-rf", b"new\nline.txt", b"\xff\xfe.txt", "\U0001f600.txt".encode(), b"'\".txt"]
    names += [b"[a-z]*.txt", b"%s{}$HOME.TXT", b"n" * 250]
    for name, text in zip(names, TEXTS[:8], strict=True):
        Path(os.fsdecode(os.fsencode(inside) + b"/" + name)).write_text(text)
    blobs = odd / ".blobs"
    blobs.mkdir()
    write_jsonl(blobs / "1", TEXTS[8:16])
    write_parquet(blobs / "2", TEXTS[16:24])
    (odd / "link.jsonl").symlink_to(".blobs/1")
    (odd / "again.jsonl").symlink_to("link.jsonl")
    (odd / "link.parquet").symlink_to(".blobs/2")
    (odd / "z loop").symlink_to(".")
    (inside / "up").symlink_to(odd)
    (odd / "empty folder.txt").mkdir()
    commands = _commands(place)
    results = []
    for files in (plain / "*", odd / "**" / "*"):
        main, arguments = commands["mdn-eval perplexity"](files, place.work() / "out")
        answer = call(main, [*arguments, "--json"], limit=_LIMIT)
        result = json.loads(answer.out) if answer.status == 0 else {}
        counts = {key: result.get(key) for key in ("tokens", "bytes", "documents")}
        results.append((answer, counts, result.get("nats_per_token", 0.0)))
    (_, right, nats), (answer, counts, got) = results
    failure = wrong_words(answer.status, answer.err)
    if failure is None and (counts != right or not abs(got - nats) < 1e-5 or not nats):
        failure = f"{counts} and {got} for {right} and {nats}: {answer.err!r}"
    yield Attempt(ODD, f"mdn-eval perplexity on {odd}", failure)
    for name in commands.keys() - {"mdn-eval perplexity"}:
        main, arguments = commands[name](odd / "**" / "*", place.work() / "out")
        answer = call(main, arguments, limit=_LIMIT)
        failure = wrong_words(answer.status, answer.err)
        if answer.status:
            failure = failure or f"refused: {answer.err!r}"
        yield Attempt(ODD, f"{name} on {odd}", failure)


def _commands(place: Place) -> dict[str, Command]:
    run = str(place.run)
    short = ["--row", "16", "--tokens", "32", "--window", "4", "--output-dir"]
    bpe = ["--tokenizer", str(place.root / "bpe"), "--processes", "1", "--files"]
    return {
        "train": lambda files, out: (
            train,
            [*place.train(out, steps=1), "--data.files", str(files)],
        ),
        "train tokenize": lambda files, out: (tokenize.main, [str(out), *bpe, str(files)]),
        "mdn-eval perplexity": lambda files, out: (
            evaluate.main,
            ["perplexity", run, "--window", "16", "--files", str(files)],
        ),
        "mdn-inspect": lambda files, out: (
            inspect_checkpoint.main,
            [run, *short, str(out), "--files", str(files)],
        ),
    }
