"""Programs that were compiled once are kept on disk, so that the next process only reads them."""

import contextlib
import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

_SECONDS = 0.3
_BYTES = 4 * 2**30


@contextlib.contextmanager
def compiled_once(directory: Path | None = None) -> Iterator[None]:
    """Programs that are compiled inside are kept, unless jax keeps them already or is told not to.

    Kept are those that take more than 0.3 s; of more than 4 GiB the ones that were not used longest
    are removed. `JAX_COMPILATION_CACHE_DIR` names another directory, and
    `JAX_ENABLE_COMPILATION_CACHE=0` keeps nothing. A directory that cannot be written keeps nothing
    either. An entry that is cut off, by a process that died while it wrote, costs a warning.

    Args:
      directory: where; None: `mdn-jax` in the user's cache directory.
    """
    if not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir:
        yield
        return
    place = _made(directory or _of_the_user())
    if place is None:
        yield
        return
    options = {
        "jax_compilation_cache_dir": str(place),
        "jax_compilation_cache_max_size": _BYTES,
        "jax_persistent_cache_min_compile_time_secs": _SECONDS,
    }
    before = {name: getattr(jax.config, name) for name in options}
    configure(options)
    try:
        yield
    finally:
        configure(before)


def configure(options: Mapping[str, Any]) -> None:
    """Sets options of jax's cache of programs, also where something was compiled before."""
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # what was chosen before the first compilation stays otherwise


def _made(directory: Path) -> Path | None:
    """The directory if entries can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return directory if os.access(directory, os.W_OK | os.X_OK) else None


def _of_the_user() -> Path:
    """One for each kind of processor: home directories are shared, and code for one ends others."""
    from platformdirs import user_cache_path

    return user_cache_path("mdn-jax") / f"compiled-{processor()}"


def processor() -> str:
    """A digest of this kind of processor and its features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    named = (platform.machine(), platform.processor(), *features)
    return hashlib.sha256(repr(named).encode()).hexdigest()[:8]
