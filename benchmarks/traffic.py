"""Which arrays go from kernel to kernel, and how many bytes each has.

The sums by kernel are those of `benchmarks.costs.stage_costs`, which a test holds it to; here each
array has a name, for the picture of the data flow (docs/pictures.py).
"""

from typing import NamedTuple

from benchmarks.costs import CHUNK

FACTOR_ROWS, ROW_GRADIENTS = 13, 7
"""Rows of 64 float32 a chunk: factors, and those of them that gradients come back for."""
_WIDE = 4


class Kernel(NamedTuple):
    """What one kernel moves; arrays by name, in bytes.

    Attributes:
      reads: what it reads.
      writes: what it writes.
    """

    reads: dict[str, int]
    writes: dict[str, int]

    @property
    def bytes(self) -> int:
        """All that it moves."""
        return sum(self.reads.values()) + sum(self.writes.values())


KERNELS: dict[str, tuple[str, str]] = {
    "intra_chunk_fwd": ("q k gates", "A X rows keys"),
    "state_fwd": ("keys v X rows initial", "v_new states final"),
    "output_fwd": ("q v_new A rows states", "o"),
    "dv_local_bwd": ("A d_o", "d_v_local"),
    "state_bwd": ("q keys d_o d_v_local X rows d_final", "d_v d_states d_initial"),
    "inter_chunk_bwd": (
        "q k d_o d_v v_new states d_states rows column_scales",
        "d_keys d_rows",
    ),
    "recompute_gamma": ("three_gates rows", "gamma"),
    "intra_chunk_bwd": (
        "q k three_gates d_o d_v v_new d_keys gamma rows column_scales_2",
        "d_q_k d_A_L",
    ),
    "gate_bwd": ("gates d_A_L d_rows rows", "d_gates"),
}
"""What each kernel reads and writes, in the order of one forward and backward pass."""


def traffic(
    batch: int,
    length: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    *,
    states_block_k: int = 32,
) -> dict[str, Kernel]:
    """The arrays of each kernel for 16-bit inputs, the default erase key and `HV = H`.

    Args:
      batch: B.
      length: T, a multiple of the chunk.
      heads: H.
      key_dim: K.
      value_dim: V.
      states_block_k: rows of the states a program of `inter_chunk_bwd` takes.
    """
    size = 2
    tokens = batch * length * heads
    chunks = tokens // CHUNK
    keys, values, gate = tokens * key_dim * size, tokens * value_dim * size, tokens * _WIDE
    matrix = chunks * CHUNK * CHUNK * size
    states = 2 * chunks * key_dim * value_dim * size
    ends = 2 * batch * heads * key_dim * value_dim * _WIDE
    blocks = key_dim // min(states_block_k, key_dim)
    columns = chunks * value_dim * _WIDE
    sizes = {
        "q": keys,
        "k": keys,
        "v": values,
        "gates": 4 * gate,
        "three_gates": 3 * gate,
        "initial": ends,
        "A": matrix,
        "X": matrix,
        "rows": chunks * FACTOR_ROWS * CHUNK * _WIDE,
        "keys": keys,
        "v_new": values,
        "states": states,
        "final": ends,
        "o": values,
        "d_o": values,
        "d_v_local": values,
        "d_final": ends,
        "d_v": values,
        "d_states": states,
        "d_initial": ends,
        "column_scales": 4 * columns,
        "column_scales_2": 2 * columns,
        "d_keys": 2 * keys,
        "d_rows": chunks * blocks * ROW_GRADIENTS * CHUNK * _WIDE,
        "gamma": matrix,
        "d_q_k": 2 * keys,
        "d_A_L": 2 * matrix,
        "d_gates": 4 * gate,
    }
    return {
        name: Kernel(*({array: sizes[array] for array in side.split()} for side in sides))
        for name, sides in KERNELS.items()
    }
