from collections.abc import Iterator

import pytest

from tests.train.sharing import shared_steps


@pytest.fixture(scope="module", autouse=True)
def _equal_runs_share_their_step() -> Iterator[None]:
    with shared_steps():
        yield
