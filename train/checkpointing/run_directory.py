"""The directory of a run: its files, and the lock that keeps a second run out."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdn_jax.errors import RunError
from mdn_jax.saved.model import DIRECTORY, complete_steps

CONFIG_FILE, METRICS_FILE = "config.json", "metrics.jsonl"
PLOT_FILE, SAMPLE_FILE = "loss.png", "sample.txt"
LOCK_FILE = "run.lock"


@contextlib.contextmanager
def only_run(directory: Path) -> Iterator[None]:
    """Makes a run's directory and keeps every other run out of it until the end.

    The lock is the operating system's, on a file that names who holds it: it goes with the process,
    however that ends. Directories made for a run that then wrote nothing go again.

    Args:
      directory: of the run.

    Raises:
      RunError: a directory that cannot be made or written to, one that another run writes to, or a
        file system without locks.
    """
    with _made(directory):
        lock = _lock(directory)
        try:
            _check_writable(directory / DIRECTORY)
            yield
        finally:
            with contextlib.suppress(OSError):  # of a file system that is gone
                (directory / LOCK_FILE).unlink()
            os.close(lock)


@contextlib.contextmanager
def _made(directory: Path) -> Iterator[None]:
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"output_dir: expected a directory that can be made, got {directory}: {error.strerror}"
        ) from None
    try:
        yield
    finally:
        for path in new:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def _lock(directory: Path) -> int:
    """The open file that the lock is on, with who holds it written in it."""
    path = directory / LOCK_FILE
    try:
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _take(lock, path)
                if _is_at(lock, path):
                    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
                    os.ftruncate(lock, 0)
                    os.pwrite(lock, json.dumps(holder).encode(), 0)
                    os.fsync(lock)  # for those who look from other hosts
                    return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)
    except OSError as error:
        raise RunError(
            f"output_dir: expected a directory that can be written to, got {directory}: "
            f"{error.strerror}"
        ) from None


def _is_at(lock: int, path: Path) -> bool:
    """Whether a path is still that of an open file, which its last holder may have removed."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path))
    except FileNotFoundError:
        return False


def _take(lock: int, path: Path) -> None:
    """Locks an open file; flock, because locks of fcntl end when any descriptor closes."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise RunError(
                f"output_dir: expected a directory that no other run writes to, got {path.parent} "
                f"of {_holder(path)}; wait for its end, or choose another --output-dir"
            ) from None
        path.unlink(missing_ok=True)
        raise RunError(
            "output_dir: expected a file system with locks, without which two runs may mix in one "
            f"directory, got {path.parent}: {error.strerror}; mount it with locks (flock), or "
            "choose another --output-dir"
        ) from None


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_bytes()[:4096])
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"  # which has not written its name yet


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(" ", "seconds")


def _check_writable(directory: Path) -> None:
    if directory.is_dir() and not os.access(directory, os.W_OK | os.X_OK):
        raise RunError(
            f"output_dir: expected a directory that can be written to, got {directory}: read-only, "
            "or no right to write"
        )


def way_on(directory: Path) -> str:
    """How to go on after an error, as far as the checkpoints of a run's directory allow."""
    steps = complete_steps(directory / DIRECTORY)
    if not steps:
        return "there is no checkpoint yet: start again"
    return f"the checkpoint of step {steps[-1]} is as it was: continue with --resume"


def read_config(directory: Path) -> dict[str, Any]:
    """The configuration file of a run, as JSON values.

    Raises:
      RunError: no such file, or not a JSON object.
    """
    path = directory / CONFIG_FILE
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        got = error.strerror
    except (ValueError, RecursionError) as error:
        got = f"{error}" if isinstance(error, RecursionError) else f"no JSON ({error})"
    else:
        if isinstance(values, dict):
            return values
        got = f"{json.dumps(values):.40}"
    raise RunError(f"{CONFIG_FILE}: expected a run's configuration in {path}, got {got}")


def config_int(directory: Path, values: dict[str, Any], name: str) -> int:
    """A number of at least 1 in a run's configuration.

    Args:
      directory: of the run.
      values: from `read_config`.
      name: as the flag is called, with dots.

    Raises:
      RunError: there is none.
    """
    value: Any = values
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if type(value) is not int or value < 1:
        raise RunError(
            f"{CONFIG_FILE}: expected an int {name} >= 1 in {directory / CONFIG_FILE}, "
            f"got {json.dumps(value):.40}"
        )
    return value
