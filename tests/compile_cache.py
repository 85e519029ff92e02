"""What XLA compiles for the tests is kept for the next run of them, which only reads it.

Compiling is most of their time. A program is kept under a digest of all that it was compiled from:
its operations, XLA's flags and the versions of jax and XLA. Another program is compiled.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from mdn_jax.compiled import configure

_SUFFIX = "-cache"  # of the files that hold programs
_DAYS = 14


@contextlib.contextmanager
def no_folder() -> Iterator[None]:
    """As a user has it: jax is told of no folder, and commands have their own."""
    options = {"jax_compilation_cache_dir": None, "jax_enable_compilation_cache": True}
    before = {name: getattr(jax.config, name) for name in options}
    configure(options)
    try:
        yield
    finally:
        configure(before)


class CompiledPrograms:
    """The programs of one process and its children, in a folder of its own until they are kept.

    Several processes test at the same time, and jax may read what another one has half written.
    So they exchange whole files, when no child of theirs writes.

    Args:
      kept: folder for the programs of all runs, on this kind of processor.
    """

    def __init__(self, kept: Path) -> None:
        self._kept = kept
        self._folder = tempfile.TemporaryDirectory(prefix="compiled-")
        self._own = Path(self._folder.name)
        self._take()

    def use(self) -> None:
        """Tells jax of the folder, here and in every child."""
        for name, value in (
            ("jax_compilation_cache_dir", str(self._own)),
            ("jax_persistent_cache_min_compile_time_secs", 0.0),
            ("jax_persistent_cache_min_entry_size_bytes", -1),
        ):
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)

    def exchange(self) -> None:
        """Keeps what is new, each file whole or not at all; takes what others have kept."""
        with contextlib.suppress(OSError):  # a tree that cannot be written, a full disk
            self._kept.mkdir(parents=True, exist_ok=True)
            for name in _programs(self._own) - _programs(self._kept):
                program = self._own / name
                # a child that was killed may leave an empty file
                if not program.is_symlink() and program.stat().st_size:
                    part = self._kept / f"{name}.{os.getpid()}"
                    shutil.copyfile(program, part)
                    part.replace(self._kept / name)
            self._take()

    def _take(self) -> None:
        for name in _programs(self._kept) - _programs(self._own):
            (self._own / name).symlink_to(self._kept / name)

    def keep(self) -> None:
        """Keeps what is new and removes what has become old."""
        self.exchange()
        with contextlib.suppress(OSError):
            for file in self._kept.iterdir():
                used = max(file.stat().st_atime, file.stat().st_mtime)
                if time.time() - used > _DAYS * 86_400:
                    file.unlink(missing_ok=True)
        self._folder.cleanup()


def _programs(folder: Path) -> set[str]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return {name for name in os.listdir(folder) if name.endswith(_SUFFIX)}
    return set()
