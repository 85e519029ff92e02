import os
from collections.abc import Iterator

# tests compile much and compute little; read when jax starts its backend
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_backend_optimization_level=0", os.environ.get("XLA_FLAGS", "")]
).strip()

import jax
import pytest
from hypothesis import settings

# compilation makes the first example slow, and timing is not what these tests are about
settings.register_profile("project", deadline=None, max_examples=15, derandomize=True)
settings.load_profile("project")


@pytest.fixture(scope="module", autouse=True)
def _no_compiled_functions_left() -> Iterator[None]:
    """Each holds memory maps; a process may have 65,530 of them and dies with the next."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield
