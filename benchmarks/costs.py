"""Operations and bytes of the operator and of its kernels, counted by hand from the shapes.

The operator's counts are those of section 6 of docs/algorithm.md; they depend on the shape alone,
so that times of different algorithms compare. A kernel's are the products that it takes, and every
array that it reads or writes, once.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.momentum_delta.rows import GRADIENT_ROWS, FactorRow
from pallas_kernels.momentum_delta.types import CHUNK, HALF, Sizes
from pallas_kernels.tiling import Tiles

# of float32 gates, row factors and the states at a row's ends
_WIDE = 4
# the operator is counted with whole matrices: X joins blocks of 2, 4, ... steps by two products
_WHOLE_INVERSE_PRODUCTS = 2 * ((CHUNK // 2).bit_length() - 1)
# the kernels' products inside a chunk are of halves, an eighth of the operations of whole ones:
# one for gamma in each half; for X, joins of blocks of 2, 4, ... steps by two each, and the corner
_EIGHTH = 1 / 8
_GAMMA_PRODUCTS = 2 * _EIGHTH
_INVERSE_PRODUCTS = (2 * 2 * ((HALF // 2).bit_length() - 1) + 2) * _EIGHTH
# gamma again and three more for its gradient, in each half
_GATE_PRODUCTS = 2 * 4 * _EIGHTH


class Peak(NamedTuple):
    """What a device reaches.

    Attributes:
      flops: a second, dense products of 16-bit operands.
      bandwidth: bytes a second, read and written.
    """

    flops: float
    bandwidth: float


PEAKS = {
    "NVIDIA H100 80GB HBM3": Peak(800e12, 3.0e12),
    "NVIDIA H200": Peak(800e12, 4.1e12),
}
"""By device kind; measured with a product of 8192^3 and a copy.

Ten products at a time: without a pause between, an H200 fell to 700e12, by its power.
"""


class Cost(NamedTuple):
    """What a call must do at least.

    Attributes:
      flops: multiplications and additions of its products.
      bytes: that it must move.
    """

    flops: int
    bytes: int

    def floor(self, device_kind: str, dtype: jax.typing.DTypeLike) -> float | None:
        """Seconds that no call can beat; None for an unknown device or operands not of 16 bits."""
        peak = PEAKS.get(device_kind)
        if peak is None or jnp.dtype(dtype).itemsize != 2:
            return None
        return max(self.flops / peak.flops, self.bytes / peak.bandwidth)


def operator_cost(
    sizes: Sizes,
    dtype: jax.typing.DTypeLike,
    *,
    backward: bool = False,
    explicit_p: bool = False,
    momentum: bool = True,
) -> Cost:
    """The operator's cost from zero states, in chunks of 64.

    Forward, per token and value head: `12 K V` operations for the states, `2 C (2 K + 2 V)` inside
    the chunk, the products for gamma and X. Forward and backward: three times that. Bytes: inputs
    and outputs once; with `backward` also cotangents and gradients once.

    Args:
      sizes: of the call.
      dtype: of q, k, v.
      backward: with the backward pass.
      explicit_p: with an erase key of its own.
      momentum: False for the gated delta rule: one state, `6 K V`, no gamma, two gates.
    """
    b, t, heads, p_heads, value_heads, key_dim, value_dim = sizes
    tokens = b * t * value_heads
    states = 2 if momentum else 1
    matrices = _WHOLE_INVERSE_PRODUCTS + (1 if momentum else 0)
    flops = tokens * (
        6 * states * key_dim * value_dim
        + 2 * CHUNK * (2 * key_dim + 2 * value_dim)
        + 2 * CHUNK * CHUNK * matrices
    )
    keys = b * t * key_dim * (2 * heads + (p_heads if explicit_p else 0))
    size = jnp.dtype(dtype).itemsize
    gates = (4 if momentum else 2) * tokens * _WIDE
    inputs = (keys + tokens * value_dim) * size + gates
    outputs = tokens * value_dim * size
    outputs += states * b * value_heads * key_dim * value_dim * _WIDE
    # a gradient for each input, a cotangent for each output
    return Cost(3 * flops, 2 * (inputs + outputs)) if backward else Cost(flops, inputs + outputs)


StageName = Literal[
    "intra_chunk_fwd",
    "state_fwd",
    "output_fwd",
    "dv_local_bwd",
    "state_bwd",
    "inter_chunk_bwd",
    "recompute_gamma",
    "intra_chunk_bwd",
    "gate_bwd",
]
"""A kernel's name."""
STAGES: tuple[StageName, ...] = get_args(StageName)
"""The kernels in the order of one forward and backward pass."""


def stage_costs(
    sizes: Sizes,
    dtype: jax.typing.DTypeLike,
    tiles: Tiles,
    *,
    explicit_p: bool = False,
    storage: jax.typing.DTypeLike | None = None,
) -> dict[str, Cost]:
    """The cost of each of `STAGES`, as docs/kernels.md describes them.

    Operations are those of the products, in however many parts a kernel takes them.

    Args:
      sizes: of the call; `T` a multiple of the chunk.
      dtype: of q, k, v.
      tiles: `inter_chunk_bwd` writes one part of the row gradients a block of K.
      explicit_p: with an erase key of its own.
      storage: dtype of what the kernels hand on; None: that of q.
    """
    b, t, heads, p_heads, value_heads, key_dim, value_dim = sizes
    size = jnp.dtype(dtype).itemsize
    stored = jnp.dtype(storage or dtype).itemsize
    tokens, chunks = b * t * value_heads, b * value_heads * sizes.chunks
    # operations in a chunk: [C, K] x [K, V], [C, C] x [C, V], [C, C] x [C, K], [C, C] x [C, C]
    state = 2 * CHUNK * key_dim * value_dim
    in_v, in_k, square = (2 * CHUNK * CHUNK * width for width in (value_dim, key_dim, CHUNK))
    # bytes of one array
    q = k = b * t * heads * key_dim * size
    p = b * t * p_heads * key_dim * size if explicit_p else 0
    v, per_head = tokens * value_dim * size, tokens * key_dim * size
    v_new = tokens * value_dim * stored  # or a gradient
    gate, matrix = tokens * _WIDE, chunks * CHUNK * CHUNK * stored
    factors = chunks * len(FactorRow) * CHUNK * _WIDE
    states = 2 * chunks * key_dim * value_dim * stored
    ends = 2 * b * value_heads * key_dim * value_dim * _WIDE
    blocks = key_dim // min(tiles.inter_chunk_bwd_block_k, key_dim)
    rows = chunks * blocks * GRADIENT_ROWS * CHUNK * _WIDE
    d_keys = (3 if explicit_p else 2) * per_head
    # float16's: k and p once more, a number for each column of V and kind of sum
    keys, units = (k + p, chunks * value_dim * _WIDE) if stored == 2 else (0, 0)
    per_chunk = {
        "intra_chunk_fwd": (
            2 * in_k + (_GAMMA_PRODUCTS + _INVERSE_PRODUCTS) * square,
            q + k + p + 4 * gate + 2 * matrix + factors + keys,
        ),
        "state_fwd": (
            4 * state + in_v,
            k + p + v + matrix + factors + ends + v_new + states + ends,
        ),
        "output_fwd": (2 * state + in_v, q + v_new + matrix + factors + states + v),
        "dv_local_bwd": (in_v, matrix + v + v_new),
        "state_bwd": (
            6 * state + in_v,
            q + k + p + v + 2 * v_new + matrix + factors + ends + states + ends,
        ),
        "inter_chunk_bwd": (
            6 * state,
            q + k + p + v + 2 * v_new + 2 * states + factors + d_keys + rows + 4 * units,
        ),
        "recompute_gamma": (_GAMMA_PRODUCTS * square, 3 * gate + factors + matrix),
        "intra_chunk_bwd": (
            2 * in_v + (6 if explicit_p else 5) * in_k,
            (q + k + p + (4 if explicit_p else 3) * gate)
            + (v + 2 * v_new + factors + 3 * matrix + 2 * d_keys + 2 * units),
        ),
        "gate_bwd": (_GATE_PRODUCTS * square, 2 * matrix + rows + factors + 8 * gate),
    }
    return {name: Cost(round(chunks * flops), moved) for name, (flops, moved) in per_chunk.items()}
