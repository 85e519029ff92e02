import contextlib
import gc
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

# tests compile much and compute little; read when jax starts its backend
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_backend_optimization_level=0", os.environ.get("XLA_FLAGS", "")]
).strip()

# what a command compiles is kept for the next one; the workers have the first process's environment
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory()
    os.environ["XDG_CACHE_HOME"] = _cache.name

import jax
import pytest
from hypothesis import settings

from mdn_jax.compiled import processor
from tests.compile_cache import CompiledPrograms

with contextlib.suppress(ImportError, AttributeError):  # another JAX: it only takes longer
    from tests.pallas_interpreter import make_smaller

    make_smaller()

compiled = CompiledPrograms(Path(__file__).parents[1] / ".compiled" / processor())
compiled.use()

# compilation makes the first example slow, and timing is not what these tests are about
settings.register_profile("project", deadline=None, max_examples=15, derandomize=True)
settings.load_profile("project")


def pytest_collection_finish() -> None:
    """What was imported stays: collecting garbage has no use in walking it again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    compiled.keep()


@pytest.fixture(scope="module", autouse=True)
def _no_compiled_functions_left() -> Iterator[None]:
    """Each holds memory maps; a process may have 65,530 of them and dies with the next."""
    yield
    jax.clear_caches()
    compiled.exchange()


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of eight small text files."""
    directory = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for i in range(8):
        lines = [f"x{rng.randrange(99)} = {rng.randrange(99)}" for _ in range(20)]
        (directory / f"{i}.txt").write_text("\n".join(lines))
    return directory
