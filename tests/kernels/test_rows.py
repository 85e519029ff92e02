"""The packed rows of factors and scalars of a chunk."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.momentum_delta.rows import (
    GRADIENT_ROWS,
    REACHES,
    STATE_ROWS,
    STATE_SCALARS,
    ChunkScalar,
    FactorRow,
    pack_scalars,
)
from pallas_kernels.momentum_delta.types import CHUNK


def test_reaches_are_in_the_order_of_the_rows():
    assert [x.name for x in REACHES] == [f"REACH_{x.name}" for x in STATE_ROWS]


def test_gradients_are_of_the_first_rows():
    """Kernels count on it: a gradient's row has the number of its factor's."""
    assert tuple(FactorRow)[:GRADIENT_ROWS] == (*STATE_ROWS, FactorRow.SCALARS)
    assert list(STATE_SCALARS) == [0, 1, 2]


def test_scalars_lie_where_they_are_read():
    packed = pack_scalars({x: jnp.float32(10 + x) for x in reversed(ChunkScalar)})
    expected = np.zeros(CHUNK)
    expected[: len(ChunkScalar)] = 10 + np.arange(len(ChunkScalar))
    np.testing.assert_array_equal(packed, expected)
