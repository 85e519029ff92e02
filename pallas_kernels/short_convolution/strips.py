"""A program's strips: where it reads and writes, and the inputs that its taps see."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import masked_load, masked_store
from pallas_kernels.short_convolution.types import Branch, Plan

Window = tuple[jax.Array, ...]
"""The last inputs `[strips, channels]` float32, oldest first; zero before the document."""


class Strips(NamedTuple):
    """The part of one branch that a program owns.

    Attributes:
      branch: references to its arrays.
      x: to its inputs, its own or those of all branches.
      column: of them, where the branch begins.
      starts: to the first steps of documents, `[B, T]` int8, or None.
      row: of the batch.
      span: which of the row's spans.
      first: first step of each strip, `[strips, 1]`.
      channels: numbers of the channels, `[1, channels]`.
      real: which of them the branch has; None: all.
    """

    branch: Branch
    x: Any
    column: int
    starts: Any | None
    row: jax.Array
    span: jax.Array
    first: jax.Array
    channels: jax.Array
    real: jax.Array | None

    @property
    def length(self) -> int:
        """Steps of a row, `T`."""
        length: int = self.x.shape[1]
        return length

    def inputs(self, steps: jax.Array) -> jax.Array:
        """`[strips, channels]` of the branch's inputs, as `load` has them."""
        return self.load(self.x, steps, self.column)

    def load(self, reference: Any, steps: jax.Array, column: int = 0) -> jax.Array:
        """`[strips, channels]` of `[B, T, C]` in float32; zero where there is nothing.

        Args:
          reference: to the array.
          steps: to read.
          column: of the array, where the branch begins.
        """
        mask = self._inside(steps, reference.shape[1])
        if self.real is not None:
            mask = mask & self.real
        place = reference.at[self.row, steps, self.channels + column]
        return masked_load(place, mask).astype(jnp.float32)

    def store(
        self,
        reference: Any,
        steps: jax.Array,
        values: jax.Array,
        mask: jax.Array,
        column: int = 0,
    ) -> None:
        """Writes rows of `[B, T, C]` where `mask` `[strips, 1]` says so, from a column on."""
        if self.real is not None:
            mask = mask & self.real
        place = reference.at[self.row, steps, self.channels + column]
        masked_store(place, values.astype(reference.dtype), mask)

    def begins(self, steps: jax.Array) -> jax.Array:
        """Whether nothing before a step belongs to it, `[strips, 1]`: also behind the last."""
        behind = steps >= self.length
        if self.starts is None:
            return behind
        inside = self._inside(steps, self.length)
        return behind | (masked_load(self.starts.at[self.row, steps], inside) != 0)

    @staticmethod
    def _inside(steps: jax.Array, length: int) -> jax.Array:
        return (steps >= 0) & (steps < length)

    def taps(self) -> list[jax.Array]:
        """`[1, channels]` each, float32."""
        rows = self.branch.taps.shape[0]
        return [self._parameter(self.branch.taps.at[i, self.channels]) for i in range(rows)]

    def bias(self) -> jax.Array | None:
        """`[1, channels]` float32."""
        if self.branch.bias is None:
            return None
        return self._parameter(self.branch.bias.at[self.channels])

    def _parameter(self, place: Any) -> jax.Array:
        mask = self.channels >= 0 if self.real is None else self.real
        return masked_load(place, mask).astype(jnp.float32)

    def window(self, size: int) -> Window:
        """The `size` inputs before the strips."""
        inputs: Window = (jnp.zeros((self.first.shape[0], self.channels.shape[1])),) * size
        for distance in range(size, 0, -1):
            steps = self.first - distance
            x = self.inputs(steps)
            if self.branch.tail is not None:
                x = jnp.where(steps < 0, self.load(self.branch.tail, steps + size), x)
            inputs = (*seen(inputs, self.begins(steps))[1:], x)
        return inputs


def seen(window: Window, begins: jax.Array) -> Window:
    """The window without what is of an earlier document; selected, for it may not be finite."""
    return tuple(jnp.where(begins, 0.0, x) for x in window)


def weighted(inputs: Window, taps: Sequence[jax.Array], bias: jax.Array | None) -> jax.Array:
    """The sum of taps `[strips, channels]`."""
    total = inputs[0] * taps[0]
    for x, tap in zip(inputs[1:], taps[1:], strict=True):
        total += x * tap
    return total if bias is None else total + bias


_LOG2_E = 1.4426950408889634


def sigmoid(x: jax.Array) -> jax.Array:
    """Of float32, to 22 bits, in five instructions: `exp` and a division take nineteen."""
    inverse_root = lax.rsqrt(1.0 + jnp.exp2(x * -_LOG2_E))
    return inverse_root * inverse_root


def on_own_strips(
    joined: Any | None,
    branches: tuple[Branch, ...],
    starts: Any | None,
    plan: Plan,
    body: Callable[[int, Strips, jax.Array], None],
) -> None:
    """Runs `body` of the branch's number, the program's strips and its block of all channels."""
    block, span, row = plan.place(pl.program_id(0))
    tiles = plan.tiles
    strip = lax.broadcasted_iota(jnp.int32, (tiles.strips, 1), 0)
    lane = lax.broadcasted_iota(jnp.int32, (1, tiles.channels), 1)
    first = (span * tiles.strips + strip) * tiles.steps

    def run(index: int, before: int) -> None:
        channels = (block - before) * tiles.channels + lane
        width = plan.widths[index]
        real = None if width % tiles.channels == 0 else channels < width
        branch, column = branches[index], plan.columns[index]
        x = branch.x if joined is None else joined
        body(index, Strips(branch, x, column, starts, row, span, first, channels, real), block)

    before = 0
    for index, blocks in enumerate(plan.blocks):
        if len(branches) == 1:
            run(index, before)
        else:
            own = (block >= before) & (block < before + blocks)
            pl.when(own)(partial(run, index, before))
        before += blocks
