"""Arrays of a call, and its static sizes and tiles."""

from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl

MAX_TAPS = 8
"""Taps `W`, at most: a program holds `W - 1` inputs and as many unfinished gradients."""
MIN_STEPS = 16
"""Shorter calls are better left to XLA: a program's strips would be nearly empty."""


class Branch(NamedTuple):
    """One convolution; in specifications and kernel bodies, what stands for its arrays there.

    Attributes:
      x: inputs `[B, T, C]`, bfloat16, float16 or float32; None: they are in the joined ones.
      tail: the `W - 1` inputs before `x`, `[B, W - 1, C]` of x's dtype, oldest first; None: zeros.
      taps: `[W, C]`, any float dtype; tap `W - 1` is the current step.
      bias: `[C]`, any float dtype; None: none.
    """

    x: Any
    tail: Any | None
    taps: Any
    bias: Any | None


class Tiles(NamedTuple):
    """What a program owns: `strips` strips of `steps` steps each, `channels` channels wide.

    Chosen by compiling for capability 9.0 (`python -m benchmarks convolution --inspect`): four
    warps and 128 channels are four channels a lane, so bfloat16 is loaded 8 bytes at a time and a
    warp reads whole lines of 256 bytes. Eight channels a lane need twice the registers.

    Attributes:
      strips: that a program walks at once; its warps share them.
      steps: of a strip, a multiple of `unroll`.
      channels: a power of two.
      unroll: steps whose loads are issued together.
      warps: of a program.
    """

    strips: int = 4
    steps: int = 64
    channels: int = 128
    unroll: int = 4
    warps: int = 4


class Options(NamedTuple):
    """What is fixed when a call is traced.

    Attributes:
      activation: silu of the sum; False: the sum itself.
      tiles: of both kernels.
      interpret: run the kernels in the interpreter, on any device.
    """

    activation: bool
    tiles: Tiles
    interpret: bool


class Plan(NamedTuple):
    """Which programs there are.

    Attributes:
      batch: rows, `B`.
      length: steps, `T`.
      taps: `W`.
      widths: channels of each branch.
      columns: of the inputs, where each branch begins.
      tiles: of the kernels.
    """

    batch: int
    length: int
    taps: int
    widths: tuple[int, ...]
    columns: tuple[int, ...]
    tiles: Tiles

    @classmethod
    def of(cls, joined: Any | None, branches: tuple[Branch, ...], tiles: Tiles) -> "Plan":
        """For these branches, all `[B, T]` by their widths, and their inputs if they are joined."""
        batch, length, _ = (branches[0].x if joined is None else joined).shape
        widths = tuple(branch.taps.shape[1] for branch in branches)
        columns = (0,) * len(widths)
        if joined is not None:
            columns = tuple(sum(widths[:index]) for index in range(len(widths)))
        return cls(batch, length, branches[0].taps.shape[0], widths, columns, tiles)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of channels of each branch."""
        return tuple(pl.cdiv(width, self.tiles.channels) for width in self.widths)

    @property
    def spans(self) -> int:
        """Programs along a row; each owns `strips * steps` steps."""
        return pl.cdiv(self.length, self.tiles.strips * self.tiles.steps)

    @property
    def grid(self) -> tuple[int]:
        """Channels fastest: programs that run together read the same rows."""
        return (sum(self.blocks) * self.spans * self.batch,)

    def rounds(self, ahead: int = 0) -> int:
        """Of the loop over a strip, and over some steps ahead."""
        return pl.cdiv(self.tiles.steps + ahead, self.tiles.unroll)

    def place(self, program: Any) -> tuple[Any, Any, Any]:
        """Block among those of all branches, span and row of a program."""
        blocks = sum(self.blocks)
        rest = jax.lax.div(program, blocks)
        return jax.lax.rem(program, blocks), jax.lax.rem(rest, self.spans), rest // self.spans
