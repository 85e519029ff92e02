"""What lies in which row of the packed row factors of a chunk, and where in its row of scalars."""

from collections.abc import Mapping
from enum import IntEnum

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.momentum_delta.types import CHUNK


class FactorRow(IntEnum):
    """Rows of `IntraChunk.factors`, `[13, C]` float32 a chunk.

    The first six scale the rows of P, K, Q in the products with the states S and N (of P and K as
    the state passes have them, `WalkKeys`).
    """

    READ_S = 0
    READ_N = 1
    WRITE_S = 2
    WRITE_N = 3
    QUERY_S = 4
    QUERY_N = 5
    SCALARS = 6
    """The chunk's scalars, one an element: `ChunkScalar`."""
    NORM_Q = 7
    """Inverse norms of q, times the scale of the output."""
    NORM_K = 8
    SECOND_HALF = 9
    """`[decay_before | lead_before]` of the second half, for the gradients of the gates."""
    FIRST_END = 10
    """`[gamma | carry]` at the end of the first half, for the same."""
    POWER_K = 11
    """Powers of two by which rows of K are multiplied in `WalkKeys`."""
    POWER_P = 12
    """The same of P."""


STATE_ROWS = tuple(FactorRow)[:6]
"""The rows that scale products with the states."""
GRADIENT_ROWS = len(STATE_ROWS) + 1
"""Gradients come back for `STATE_ROWS` and the chunk's scalars."""


class ChunkScalar(IntEnum):
    """Elements of the row `FactorRow.SCALARS`.

    The first three carry the states over the chunk:
    `S_C = DECAY S_0 + LEAD N_0 + ...`, `N_C = MOMENTUM N_0 + ...`.
    """

    DECAY = 0
    LEAD = 1
    MOMENTUM = 2
    DECAY_1 = 3
    """The same three at the end of the first half."""
    LEAD_1 = 4
    MOMENTUM_1 = 5
    MOMENTUM_2 = 6
    """How much momentum the second half keeps."""
    REACH_READ_S = 7
    """How far gradients of v_new and of outputs of at most 1 move an element of the gradient of a
    state, and how far a chunk of v_new of at most 1 moves an element of a state
    (block_scaling.py). In the order of `STATE_ROWS`."""
    REACH_READ_N = 8
    REACH_WRITE_S = 9
    REACH_WRITE_N = 10
    REACH_QUERY_S = 11
    REACH_QUERY_N = 12
    INVERSE_SCALE = 13
    """Block scale of `IntraChunk.inverse` in float16."""


STATE_SCALARS = (ChunkScalar.DECAY, ChunkScalar.LEAD, ChunkScalar.MOMENTUM)
"""What the chunk makes of the states that enter it."""
REACHES = tuple(ChunkScalar)[7:13]
"""Of `STATE_ROWS`."""


def pack_scalars(scalars: Mapping[int, jax.Array]) -> jax.Array:
    """A row `[C]` of float32 scalars by their place; zero elsewhere."""
    row = jnp.zeros((CHUNK,), jnp.float32)
    for place, value in scalars.items():
        row = jnp.where(lax.broadcasted_iota("int32", (CHUNK,), 0) == int(place), value, row)
    return row
