"""What keeps runs apart, and the words for a directory that is not as it should be."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys

import pytest

from mdn_jax.errors import RunError
from train.checkpointing.run_directory import LOCK_FILE, config_int, only_run, read_config, way_on

HOLD = (
    "import fcntl, sys\n"
    "f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print(1, flush=True); input()"
)


def test_a_second_run_is_told_who_writes(tmp_path):
    with only_run(tmp_path):
        with (
            pytest.raises(
                RunError,
                match=rf"^output_dir: expected .* no other run .* got {tmp_path} of process "
                rf"{os.getpid()} on \S+ since \d{{4}}-\d\d-\d\d ",
            ),
            only_run(tmp_path),
        ):
            pass
        assert (tmp_path / LOCK_FILE).exists()  # the one that was refused took nothing away
    assert list(tmp_path.iterdir()) == []
    with only_run(tmp_path):
        pass


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / LOCK_FILE
    path.write_text('{"pid": 1')  # of a run that was killed while it wrote its name
    command = [sys.executable, "-S", "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"1\n"
        with pytest.raises(RunError, match="of another process"), only_run(tmp_path):
            pass
        process.kill()
        process.wait()
        with only_run(tmp_path):
            assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_lock_on_a_file_that_was_removed_is_no_lock(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def late(lock, how):  # its holder ends between this process's open and lock
        if not calls:
            (tmp_path / LOCK_FILE).unlink()
        calls.append(how)
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with only_run(tmp_path):
        assert len(calls) == 2
        monkeypatch.undo()
        with pytest.raises(RunError, match="no other run"), only_run(tmp_path):
            pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch, code):
    def refuse(lock, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    directory = tmp_path / "new" / "run"
    words = rf"file system with locks.*{directory}: {os.strerror(code)}"
    with pytest.raises(RunError, match=words), only_run(directory):
        pass
    assert list(tmp_path.iterdir()) == []


def test_directories_are_kept_once_there_is_something_in_them(tmp_path):
    with contextlib.suppress(KeyError), only_run(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").write_text("")
        raise KeyError
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


@contextlib.contextmanager
def read_only(directory):
    """A read-only file system of its own, where the tests may mount one."""
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(directory)]
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.mark.parametrize("name", ["run", "run/checkpoints"])
def test_a_read_only_directory_is_named_before_anything_is_written(tmp_path, name):
    directory = tmp_path / name
    directory.mkdir(parents=True)
    words = rf"^output_dir: expected a directory that can be written to, got {directory}: .*[Rr]ead"
    with (
        read_only(directory),
        pytest.raises(RunError, match=words),
        only_run(tmp_path / "run"),
    ):
        pytest.fail("it began")
    assert not list(tmp_path.rglob(LOCK_FILE))


def test_advice_can_be_followed(tmp_path):
    assert way_on(tmp_path) == "there is no checkpoint yet: start again"
    for step in (20, 100):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    (tmp_path / "checkpoints" / "120.orbax-checkpoint-tmp").mkdir()
    assert way_on(tmp_path) == "the checkpoint of step 100 is as it was: continue with --resume"


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"", "no JSON"),
        (b'{"steps": 3', "no JSON"),
        (b"\xff\xfe{}", "no JSON"),
        (b"[" * 200_000, "recursion"),
        (b"[1, 2]", r"\[1, 2\]"),
        (None, "No such file"),
    ],
)
def test_a_configuration_that_is_none_is_named(tmp_path, content, got):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=rf"^config.json: expected .* in {path}, got .*{got}"):
        read_config(tmp_path)


@pytest.mark.parametrize("values", [{}, {"a": 7}, {"a": {"b": "7"}}, {"a": {"b": True}}, {"a": []}])
def test_a_configuration_without_a_number_is_named(tmp_path, values):
    with pytest.raises(RunError, match=rf"^config.json: expected an int a.b >= 1 in {tmp_path}"):
        config_int(tmp_path, values, "a.b")
    assert config_int(tmp_path, {"a": {"b": 7}}, "a.b") == 7
