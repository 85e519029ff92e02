"""Runs that ended badly, as resume finds them; `tests.faults` kills them and fills their disks."""

import dataclasses
import shutil

import pytest

from mdn_jax.errors import RunError
from tests.train.helpers import assert_identical, tiny_config
from train.loop import train


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
