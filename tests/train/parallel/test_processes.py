"""Two processes of `python -m train`: what ends one ends the other, soon and with a sentence."""

import errno
import signal
import time
from functools import partial

import pytest

from tests.train.parallel.processes import SOON, Pair
from train.data.batches import Batches
from train.metrics.log import read_metrics

pytestmark = pytest.mark.slow


def fill_up(after):
    """A disk that is full after some batches."""
    take, taken = Batches.__next__, []

    def next_batch(self):
        taken.append(1)
        if len(taken) > after:
            raise OSError(errno.ENOSPC, "No space left on device", "shard")
        return take(self)

    Batches.__next__ = next_batch


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def pair(tmp_path, corpus, cache):
    return lambda **options: Pair(tmp_path, options.pop("files", 2 * [corpus]), cache, **options)


def test_an_error_of_one_at_the_start_ends_both(pair, corpus, tmp_path):
    statuses, lines = pair(files=(corpus, tmp_path / "nowhere")).ends()
    assert statuses == [1, 1], lines
    assert lines[1].startswith("python -m train: error: data.files: ")
    assert lines[0] == lines[1].replace("error: ", "error: process 1: ")


def test_an_error_of_one_between_steps_ends_both(pair):
    statuses, lines = pair(faults=(None, partial(fill_up, 7))).ends()
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
    assert lines[1 - killed].startswith(f"python -m train: error: process {killed} on ")


def test_a_signal_to_one_stops_both_after_the_same_step(pair):
    run = pair()
    run.send(1, signal.SIGTERM)
    statuses, lines = run.ends()
    assert statuses == [128 + signal.SIGTERM] * 2, lines
    last = max(record["step"] for record in read_metrics(run.metrics))
    checkpoints = run.metrics.parent / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == [str(last)]
