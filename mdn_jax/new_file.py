"""Files that are there complete or not at all."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that becomes it at the end, or goes if there is none.

    A file that is there stays as it was until all of the new one is on the disk, whatever happens
    to the process or the machine. Two that write to one path at once do not mix: one of them is
    the last. A link is followed; a device or a pipe is written to as it is.

    Args:
      path: file to write.

    Yields:
      The path to write to.

    Raises:
      OSError: it cannot be written; by the name of `path`.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        yield target
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        yield temporary
        _to_disk(temporary)
        temporary.replace(target)
        _to_disk(target.parent)
    except OSError as error:
        if error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_place(path: str | os.PathLike[str]) -> None:
    """Raises OSError, by the name of `path`, where `new_file` could not write it.

    For what takes long to make: a file beside it is made and removed.
    """
    target = Path(os.path.realpath(os.path.expanduser(path)))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not target.exists() or target.is_file():
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        try:
            temporary.touch(exist_ok=False)
            temporary.unlink()
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file of text (UTF-8), as of `new_file`."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _to_disk(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
