from collections.abc import Iterator

import jax
import pytest
from hypothesis import settings

# compilation makes the first example slow, and timing is not what these tests are about
settings.register_profile("project", deadline=None, max_examples=15, derandomize=True)
settings.load_profile("project")


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield
