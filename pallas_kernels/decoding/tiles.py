"""Blocks of the products of a few rows with a matrix, and which shapes run.

Chosen for 132 multiprocessors: as many programs as those at least, each with tens of kilobytes on
their way (docs/design.md), and by `python -m benchmarks decoding --parts sweep` on an H200.
"""

from typing import NamedTuple

import jax

from pallas_kernels.backends import triton_lacks
from pallas_kernels.tiling import (
    KEY_DIMS,
    MAX_VALUE_DIM,
    SHARED_MEMORY,
    DecodeTiles,
    padded_value_dim,
)

DTYPES = ("bfloat16", "float16", "float32")
MAX_TAPS = 8
LEAST_WIDTH = 16
"""Widths of products are multiples of this."""
_PROGRAMS = 120
"""Enough for every multiprocessor to have about one."""
_FEW, _MANY = 2048, 16_384
"""Outputs of a product that are too few for every multiprocessor, or a vocabulary."""
_REGISTERS = 96
"""Of a lane, for weights on their way."""


class Tiles(NamedTuple):
    """Of a product `[B, width] x [outputs, width]^T`.

    Attributes:
      rows: of the batch in a program.
      outputs: of each matrix in a program.
      width: of a step along the width.
      at_once: steps whose weights are loaded together; products by `dot` pipeline them instead.
      warps: of a program.
      stages: of the pipeline.
      dot: by tensor cores; otherwise each row's products are summed as they come.
    """

    rows: int
    outputs: int
    width: int
    at_once: int
    warps: int
    stages: int
    dot: bool

    def within(self, head: int, width: int) -> "Tiles":
        """The same where a step has to lie within a head; as many weights at once."""
        step = min(self.width, head & -head)
        if step == self.width:
            return self
        most, steps = self.at_once * self.width // step, width // step
        at_once = 1 if self.dot else next(n for n in range(most, 0, -1) if steps % n == 0)
        return self._replace(width=step, at_once=at_once)


def product_tiles(
    batch: int, outputs: int, width: int, itemsize: int, *, matrices: int = 1
) -> Tiles:
    """The tiles that ship.

    Args:
      batch: rows.
      outputs: rows of each matrix.
      width: of the rows.
      itemsize: bytes of a weight.
      matrices: that a program multiplies with, at the same rows.
    """
    if batch == 1 or itemsize == 4:
        return _summed(batch, width, itemsize, matrices)
    return _by_dot(batch, outputs, width, matrices)


def mixer_tiles(key_dim: int, value_dim: int, heads: int) -> DecodeTiles:
    """The block of V and the warps of the mixer's kernel.

    Args:
      key_dim: K.
      value_dim: V.
      heads: value heads of all rows, `B * HV`.
    """
    block_v = 32 if value_dim >= 32 and heads * value_dim // 32 >= 2 * _PROGRAMS else 16
    # 32 elements of each state to a thread, or 16 where the device is not full
    share = 1024 if heads * value_dim // block_v >= 2 * _PROGRAMS else 512
    return DecodeTiles(block_v, max(1, min(8, key_dim * block_v // share)))


def _summed(batch: int, width: int, itemsize: int, matrices: int) -> Tiles:
    rows, block, step = min(2, batch), 8, _step(width, 256)
    steps = width // step
    # registers of a step's weights where a warp has an output
    lane = matrices * max(1, step * itemsize // (32 * 4))
    most = max(1, _REGISTERS // lane)
    at_once = next(n for n in range(min(most, steps), 0, -1) if steps % n == 0)
    return Tiles(rows, block, step, at_once, block, 1, dot=False)


def _by_dot(batch: int, outputs: int, width: int, matrices: int) -> Tiles:
    if outputs >= _MANY and batch > 32:
        return Tiles(64, 128, _step(width, 64), 1, 4, 4, dot=True)
    rows = 16 if batch <= 16 or outputs <= _FEW else 32
    blocks = [64, 32, 16] if matrices == 1 else [32, 16]
    programs = -(-batch // rows)
    # few rows are a pipeline that hardly fills: two programs hide that better than one
    enough = _PROGRAMS * (2 if rows == 16 else 1)
    block = next((n for n in blocks if programs * outputs // n >= enough), 16)
    step = _step(width, 128 if rows + matrices * block > 64 else 256)
    stages = 6 if rows + matrices * block <= 32 and width // step > 6 else 4
    # 16 outputs a warp
    return Tiles(rows, block, step, 1, max(2, matrices * block // 16), stages, dot=True)


def _step(width: int, most: int) -> int:
    """The largest power of two up to `most` that divides a width."""
    return min(width & -width, most)


def unsupported(
    *,
    dtype: jax.typing.DTypeLike,
    capability: tuple[int, int] | None,
    key_dim: int,
    value_dim: int,
    conv_size: int,
    widths: dict[str, int],
    largest: int,
) -> str | None:
    """Why a model cannot run on these kernels; None if it can.

    Args:
      dtype: of the computation.
      capability: compute capability of the device; None for a device that is no CUDA GPU.
      key_dim: K.
      value_dim: V.
      conv_size: taps.
      widths: that products sum over, by their names.
      largest: elements of the largest matrix.
    """
    name = jax.numpy.dtype(dtype).name
    if name not in DTYPES:
        return f"{', '.join(DTYPES)} models, got {name}"
    if key_dim not in KEY_DIMS:
        return f"K one of {', '.join(map(str, KEY_DIMS))}, got {key_dim}"
    if value_dim > MAX_VALUE_DIM or padded_value_dim(value_dim) != value_dim:
        return f"V a power of two from 16 to 128, or 256, 384 or 512, got {value_dim}"
    if conv_size > MAX_TAPS:
        return f"at most {MAX_TAPS} taps, got {conv_size}"
    for what, width in widths.items():
        if width % LEAST_WIDTH:
            return f"{what} a multiple of {LEAST_WIDTH}, got {width}"
    if largest >= 2**31:
        return f"matrices of fewer than 2^31 elements, got {largest:,}"
    if capability is None:
        return "a CUDA GPU, got none"
    if capability not in SHARED_MEMORY:
        known = ", ".join(f"{major}.{minor}" for major, minor in SHARED_MEMORY)
        return f"compute capability {known}, got {capability[0]}.{capability[1]}"
    return triton_lacks()
