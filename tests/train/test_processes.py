"""Two processes of `mdn-train`: what ends one ends the other, soon and with a sentence."""

import errno
import multiprocessing
import os
import shutil
import signal
import sys
import time

import jax
import pytest

from tests.train.helpers import TINY_MODEL, TINY_RUN
from train.data.batches import Batches
from train.main import main
from train.metrics import read_metrics
from train.relay import free_port

pytestmark = pytest.mark.slow

SOON = 60.0  # seconds for the others to end, on a machine that has other things to do
MANY = {"steps": 1_000_000, "checkpoint_every": 1_000_000, "eval_every": 1_000_000}
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train.main"])  # children start in a moment


def flags(values, prefix=""):
    named = {name.replace("_", "-"): str(x) for name, x in values.items()}
    return [word for name, x in named.items() for word in (f"--{prefix}{name}", x)]


def fill_up(after):
    """A disk that is full after some batches."""
    take, taken = Batches.__next__, []

    def next_batch(self):
        taken.append(1)
        if len(taken) > after:
            raise OSError(errno.ENOSPC, "No space left on device", "shard")
        return take(self)

    Batches.__next__ = next_batch


def start_process(arguments, output, cache, full_after):
    """What a child does: its words in a file, its exit status that of the command."""
    with open(output, "w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if full_after is not None:
        fill_up(full_after)
    sys.exit(main(arguments))


class Pair:
    """Two processes of one run."""

    def __init__(self, directory, files, cache, full_after=(None, None)):
        self.metrics = directory / "run" / "metrics.jsonl"
        self._outputs = [directory / f"{index}.txt" for index in range(2)]
        port, self._processes = free_port(), []
        for index in range(2):
            arguments = ["smoke", *flags(TINY_MODEL, "model."), *flags(TINY_RUN | MANY)]
            arguments += flags({"output_dir": directory / "run", "optimizer.warmup_steps": 1})
            arguments += flags({"coordinator": f"localhost:{port}"}, "distributed.")
            arguments += flags({"processes": 2, "index": index}, "distributed.")
            arguments += ["--data.files", str(files[index] / "*.txt")]
            process = PROCESSES.Process(
                target=start_process,
                args=(arguments, self._outputs[index], str(cache), full_after[index]),
            )
            process.start()
            self._processes.append(process)

    def send(self, index, number):
        """Waits for some steps and sends a signal to one of the processes."""
        while len(read_metrics(self.metrics)) < 5 and self._processes[index].is_alive():
            time.sleep(0.05)
        os.kill(self._processes[index].pid, number)

    def ends(self):
        """Exit statuses, and the last lines that were said."""
        statuses = []
        for process in self._processes:
            process.join(SOON + 120 * (not statuses))  # the first may compile
            statuses.append(process.exitcode)
            process.kill()
        texts = [output.read_text() for output in self._outputs]
        assert not any("stack trace" in text or "absl::" in text for text in texts), texts
        return statuses, [text.splitlines()[-1] if text else "" for text in texts]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def pair(tmp_path, corpus, cache):
    return lambda **options: Pair(tmp_path, options.pop("files", 2 * [corpus]), cache, **options)


def test_other_documents_end_both_before_the_first_step(pair, corpus, tmp_path):
    fewer = tmp_path / "fewer"
    shutil.copytree(corpus, fewer)
    for name in ("1.txt", "5.txt"):
        (fewer / name).unlink()
    run = pair(files=(corpus, fewer))
    statuses, lines = run.ends()
    assert statuses == [1, 1], lines
    assert lines[0] == lines[1]
    assert lines[0].startswith("mdn-train: error: data.files: expected the same documents")
    assert not run.metrics.exists()


def test_an_error_of_one_at_the_start_ends_both(pair, corpus, tmp_path):
    statuses, lines = pair(files=(corpus, tmp_path / "nowhere")).ends()
    assert statuses == [1, 1], lines
    assert lines[1].startswith("mdn-train: error: data.files: ")
    assert lines[0] == lines[1].replace("error: ", "error: process 1: ")


def test_an_error_of_one_between_steps_ends_both(pair):
    statuses, lines = pair(full_after=(None, 7)).ends()
    assert statuses == [1, 1], lines
    assert "No space left on device" in lines[1]
    assert lines[0] == lines[1].replace("error: ", "error: process 1: ")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other(pair, killed):
    run = pair()
    run.send(killed, signal.SIGKILL)
    began = time.monotonic()
    statuses, lines = run.ends()
    assert time.monotonic() - began < SOON
    assert statuses[killed] == -signal.SIGKILL
    assert statuses[1 - killed] == 1, lines
    assert lines[1 - killed].startswith(f"mdn-train: error: process {killed} on ")


def test_a_signal_to_one_stops_both_after_the_same_step(pair):
    run = pair()
    run.send(1, signal.SIGTERM)
    statuses, lines = run.ends()
    assert statuses == [128 + signal.SIGTERM] * 2, lines
    last = max(record["step"] for record in read_metrics(run.metrics))
    checkpoints = run.metrics.parent / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == [str(last)]
