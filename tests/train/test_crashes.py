"""Runs that end badly: killed at any moment, with a full disk, with damaged checkpoints."""

import contextlib
import dataclasses
import errno
import multiprocessing
import os
import random
import shutil
import subprocess
import time

import jax
import orbax.checkpoint as ocp
import pytest

from tests.train.helpers import assert_identical, tiny_config
from train.checkpoint import complete_steps, has_checkpoint
from train.errors import RunError
from train.loop import train
from train.metrics import read_metrics
from train.run_directory import only_run
from train.trainer import Trainer

KILLS, STEPS = 10, 44


def start_run(config, cache, resume):
    """The run of a child process."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        train(dataclasses.replace(config, resume=resume))


def last_step(config):
    records = read_metrics(config.directory / "metrics.jsonl")
    return max((record["step"] for record in records), default=0)


def saved(config, step):
    """State and position in the data of a checkpoint."""
    directory = config.directory / "checkpoints" / str(step)
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(directory / "state", Trainer(config).like)
    return state, (directory / "data" / "metadata").read_text()


@pytest.mark.slow
def test_killed_ten_times_is_identical_to_never_stopped(corpus, tmp_path):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train.loop"])  # children start in a moment
    options = {"steps": STEPS, "checkpoint_every": 1, "eval_every": 100, "sample_tokens": 0}
    whole, killed = (tiny_config(corpus, tmp_path / name, **options) for name in ("whole", "kill"))
    rng = random.Random(0)

    def launch(config):
        arguments = (config, str(tmp_path / "cache"), has_checkpoint(config.directory))
        process = processes.Process(target=start_run, args=arguments)
        process.start()
        return process

    process = launch(whole)
    process.join()
    assert process.exitcode == 0
    resumed_from = []
    for kill in range(KILLS):
        target = 1 + 4 * kill + rng.randrange(4)
        process = launch(killed)
        while last_step(killed) < target and process.is_alive():
            time.sleep(0.001)
        if process.is_alive():
            second = only_run(killed.directory)
            with pytest.raises(RunError, match=rf"of process {process.pid} on "), second:
                pass
        time.sleep(rng.uniform(0, 0.05))  # in the middle of a step, or of writing a checkpoint
        process.kill()
        process.join()
        assert process.exitcode == -9
        if has_checkpoint(killed.directory):
            steps = (killed.directory / "checkpoints").iterdir()
            resumed_from.append(max(int(p.name) for p in steps if p.name.isdigit()))
    assert resumed_from == sorted(resumed_from)
    assert len(set(resumed_from)) > KILLS // 2  # they were killed at different places
    process = launch(killed)
    process.join()
    assert process.exitcode == 0
    (state, position), (expected, expected_position) = (saved(c, STEPS) for c in (killed, whole))
    assert_identical(state, expected)
    assert position == expected_position
    assert int(state.step) == STEPS
    losses = [
        [(r["step"], r["loss"]) for r in read_metrics(c.directory / "metrics.jsonl") if "loss" in r]
        for c in (killed, whole)
    ]
    assert [step for step, _ in losses[0]] == list(range(1, STEPS + 1))
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    config = tiny_config(corpus, tmp_path_factory.mktemp("finished") / "run", sample_tokens=0)
    result = train(config)
    assert not (config.directory / "sample.txt").exists()
    return config, result


def copy_of(config, directory):
    shutil.copytree(config.directory, directory)
    return dataclasses.replace(config, output_dir=str(directory), resume=True)


@pytest.mark.slow
def test_a_checkpoint_half_written_is_never_restored(finished, tmp_path):
    config, expected = finished
    run = copy_of(config, tmp_path / "run")
    checkpoints = run.directory / "checkpoints"
    # as Orbax names it until all of it is there
    half = checkpoints / "6.orbax-checkpoint-tmp"
    (checkpoints / "6").rename(half)
    shutil.rmtree(half / "data")
    assert_identical(train(run).state, expected.state)
    assert {path.name for path in checkpoints.iterdir()} == {"3", "6"}


def files_of(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.slow
# Orbax raises at the first array and leaves the readers of the others to fail alone
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(finished, tmp_path, damage):
    config, expected = finished
    run = copy_of(config, tmp_path / "run")
    # how the arrays are spread over files, and which of their bytes are in use, is chance
    for path in (run.directory / "checkpoints" / "6" / "state").glob("**/d/*"):
        data = bytearray(path.read_bytes())
        if damage == "gone":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(data[: len(data) // 2])
        else:
            for i in range(16):
                data[(2 * i + 1) * len(data) // 32] ^= 16
            path.write_bytes(data)
    before = files_of(run.directory)
    with pytest.raises(
        RunError, match=r"(?s)checkpoint of step 6 .* continue with --resume-step 3"
    ):
        train(run)
    assert files_of(run.directory) == before
    if damage == "cut":
        again = train(dataclasses.replace(run, resume_step=3))
        assert_identical(again.state, expected.state)


@contextlib.contextmanager
def small_disk(directory, megabytes):
    """A file system of its own, where the tests may mount one."""
    directory.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(directory)]
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill_and_run(config, disk, errors):
    """The run of a child process, whose disk is full when it measures the held-out loss."""
    initialise = Trainer.__init__

    def filling(self, config, **options):
        initialise(self, config, **options)
        measure = self.evaluate

        def measured(params):
            with contextlib.suppress(OSError), (disk / "filler").open("wb", 0) as filler:
                while True:
                    filler.write(bytes(4096))
            return measure(params)

        self.evaluate = measured

    Trainer.__init__ = filling
    try:
        train(config)
    except RunError as error:
        errors.put(str(error))


@pytest.mark.slow
def test_a_full_disk_is_named_and_earlier_checkpoints_go_on(finished, tmp_path):
    config, expected = finished
    disk = tmp_path / "disk"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train.loop"])
    with small_disk(disk, 8):
        run = copy_of(config, disk / "run")
        checkpoints = run.directory / "checkpoints"
        shutil.rmtree(checkpoints / "6")
        errors = processes.SimpleQueue()
        process = processes.Process(target=fill_and_run, args=(run, disk, errors))
        process.start()
        process.join()
        message = errors.get()  # one line for the user, whichever file found no room
        assert os.strerror(errno.ENOSPC) in message
        assert str(run.directory) in message
        assert complete_steps(checkpoints) == [3]
        (disk / "filler").unlink()
        assert_identical(train(run).state, expected.state)
