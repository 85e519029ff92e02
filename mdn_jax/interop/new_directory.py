"""Directories that are there complete or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside `target` that becomes it at the end, or goes if there is none.

    Args:
      target: directory to make; nothing or an empty directory so far.

    Raises:
      ValueError: there is something already.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output: expected a path where nothing is yet, got {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    temporary.mkdir()
    try:
        yield temporary
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
