"""Products of a few rows with matrices: what four of the five kernels of a layer share.

A matrix has a row for each output, so that what a program reads of it is in one piece. There are
two ways. For one row (and in float32, which tensor cores would round) a program loads all its
weights at once, before anything else, multiplies them by the inputs and sums along the lanes. For
more rows it walks along the width, with tensor cores, and the compiler's pipeline keeps loads on
their way. What stands before a product (a norm) and behind it (a residual) is the kernel's own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.decoding.tiles import Tiles
from pallas_kernels.lowering import (
    dot,
    kernel_call,
    loads_so_far_are_issued,
    masked_load,
    masked_store,
)

Inputs = Callable[[Any, jax.Array], jax.Array]
"""From the number and columns of a step, `[1 or rows, width]`, to the inputs `[rows, width]`."""
Prepare = Callable[[jax.Array], Inputs]
"""From rows of the batch `[rows, 1]` to their inputs; what it loads first, all steps share."""


class Matrix(NamedTuple):
    """Some rows of a matrix.

    Attributes:
      weights: reference to all of them, `[_, width]`.
      first: which the first one is.
    """

    weights: Any
    first: int


class Block(NamedTuple):
    """What a program has computed.

    Attributes:
      number: of the block of outputs.
      rows: of the batch, `[rows, 1]`.
      outputs: their numbers, `[1, outputs]`.
      inside: which of both there are, `[rows, outputs]`.
      values: for each matrix `[rows, outputs]` float32.
    """

    number: jax.Array
    rows: jax.Array
    outputs: jax.Array
    inside: jax.Array
    values: tuple[jax.Array, ...]

    def load(self, reference: Any) -> jax.Array:
        """`[B, outputs]` of the block, float32."""
        return masked_load(reference.at[self.rows, self.outputs], self.inside).astype(jnp.float32)

    def store(self, reference: Any, values: jax.Array) -> None:
        """Writes the block of `[B, outputs]`."""
        place = reference.at[self.rows, self.outputs]
        masked_store(place, values.astype(reference.dtype), self.inside)


class Product(NamedTuple):
    """The sizes of a product, and its tiles.

    Attributes:
      batch: rows.
      outputs: of each matrix.
      width: that is summed over.
      tiles: of it.
      interpret: run the kernel in the interpreter, on any device.
    """

    batch: int
    outputs: int
    width: int
    tiles: Tiles
    interpret: bool

    @property
    def blocks(self) -> int:
        """Of outputs."""
        return pl.cdiv(self.outputs, self.tiles.outputs)

    @property
    def row_blocks(self) -> int:
        """Of rows; those of one block of outputs run side by side and share its weights."""
        return pl.cdiv(self.batch, self.tiles.rows)

    def call(
        self,
        body: Callable[..., None],
        *operands: Any,
        name: str,
        out_shape: Any,
    ) -> Any:
        """Runs a kernel of one program for each block of outputs and of rows."""
        return kernel_call(
            body,
            *operands,
            name=name,
            grid=(self.blocks * self.row_blocks,),
            in_specs=jax.tree.map(lambda _: pl.BlockSpec(), list(operands)),
            out_specs=jax.tree.map(lambda _: pl.BlockSpec(), out_shape),
            out_shape=out_shape,
            warps=self.tiles.warps,
            stages=self.tiles.stages,
            interpret=self.interpret,
        )


def multiply(
    product: Product,
    matrices: Sequence[Matrix],
    prepare: Prepare,
    finish: Callable[[Block], None],
) -> None:
    """A program: its block of products, given to `finish`, once or for each row of the batch."""
    tiles, program = product.tiles, pl.program_id(0)
    number, row_block = lax.div(program, product.row_blocks), lax.rem(program, product.row_blocks)
    outputs = number * tiles.outputs + lax.iota(jnp.int32, tiles.outputs)
    first = row_block * tiles.rows

    def weights(matrix: Matrix, step: jax.Array | int) -> jax.Array:  # [outputs, width]
        place = matrix.weights.at[matrix.first + outputs[:, None], _columns(step, tiles.width)]
        return masked_load(place, (outputs < product.outputs)[:, None])

    def done(rows: jax.Array, values: tuple[jax.Array, ...]) -> None:
        inside = (rows < product.batch) & (outputs < product.outputs)[None, :]
        finish(Block(number, rows, outputs[None, :], inside, values))

    run = _by_dot if tiles.dot else _summed
    run(product, matrices, weights, first, prepare, done)


def _columns(step: jax.Array | int, width: int, lines: int = 1) -> jax.Array:
    return step * width + lax.broadcasted_iota(jnp.int32, (lines, width), 1)


def _by_dot(
    product: Product,
    matrices: Sequence[Matrix],
    weights: Callable[..., jax.Array],
    first: jax.Array,
    prepare: Prepare,
    done: Callable[..., None],
) -> None:
    tiles = product.tiles
    rows = first + lax.broadcasted_iota(jnp.int32, (tiles.rows, 1), 0)
    inputs = prepare(rows)

    def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x = inputs(i, _columns(i, tiles.width))
        parts = (dot(x, weights(matrix, i).T, None) for matrix in matrices)
        return tuple(total + part for total, part in zip(sums, parts, strict=True))

    zeros = (jnp.zeros((tiles.rows, tiles.outputs), jnp.float32),) * len(matrices)
    done(rows, lax.fori_loop(0, product.width // tiles.width, step, zeros))


def _summed(
    product: Product,
    matrices: Sequence[Matrix],
    weights: Callable[..., jax.Array],
    first: jax.Array,
    prepare: Prepare,
    done: Callable[..., None],
) -> None:
    tiles = product.tiles
    groups = product.width // (tiles.width * tiles.at_once)
    # a row of the batch for every output: inputs are loaded as weights are, to the same lanes
    lines = [jnp.full((tiles.outputs, 1), first + i) for i in range(tiles.rows)]

    def add(
        group: jax.Array | int, inputs: list[Inputs] | None, sums: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        steps = [group * tiles.at_once + i for i in range(tiles.at_once)]
        arriving = [[weights(matrix, step) for matrix in matrices] for step in steps]
        # all of them before anything that the inputs need
        loads_so_far_are_issued(product.interpret)
        inputs = inputs or [prepare(rows) for rows in lines]
        for step, pieces in zip(steps, arriving, strict=True):
            columns = _columns(step, tiles.width, tiles.outputs)
            rows = [own(step, columns).astype(jnp.float32) for own in inputs]
            wide = [piece.astype(jnp.float32) for piece in pieces]
            products = [w * x for x in rows for w in wide]  # [outputs, width]
            sums = tuple(map(lax.add, sums, products)) if sums else tuple(products)
        return sums

    if groups == 1:
        sums = add(0, None, ())
    else:
        inputs = [prepare(rows) for rows in lines]
        zeros = jnp.zeros((tiles.outputs, tiles.width), jnp.float32)
        sums = (zeros,) * (tiles.rows * len(matrices))
        sums = lax.fori_loop(0, groups, lambda group, sums: add(group, inputs, sums), sums)
    totals = [jnp.sum(x, axis=1)[None, :] for x in sums]
    for i in range(tiles.rows):
        row = first + i + jnp.zeros((1, 1), jnp.int32)
        done(row, tuple(totals[i * len(matrices) : (i + 1) * len(matrices)]))


def normalized(stream: Any, scale: Any, product: Product, eps: float) -> Prepare:
    """Inputs of a product behind the norm of the residual stream, rounded as the norm's output.

    Args:
      stream: references to the residual stream and its sums of squares.
      scale: reference to the norm's, `[width]`.
      product: whose inputs.
      eps: inside the root.
    """

    def prepare(rows: jax.Array) -> Inputs:
        inside = rows < product.batch
        inverse = inverse_root(stream.squares, (rows,), inside, product.width, eps)

        def inputs(_: Any, columns: jax.Array) -> jax.Array:
            h = masked_load(stream.h.at[rows, columns], inside & (columns >= 0))
            y = h.astype(jnp.float32) * inverse
            y *= masked_load(scale.at[columns], columns >= 0).astype(jnp.float32)
            return y.astype(h.dtype)

        return inputs

    return prepare


def inverse_root(
    squares: Any, place: tuple[Any, ...], inside: jax.Array, width: int, eps: float
) -> jax.Array:
    """`1 / sqrt(mean + eps)`, `[rows, 1]`, from sums of squares.

    Args:
      squares: reference to them, `[B, blocks]` or `[B, HV, blocks]`.
      place: rows of the batch `[rows, 1]`, and the head where there are heads.
      inside: which rows there are.
      width: numbers that were squared.
      eps: inside the root.
    """
    blocks = squares.shape[-1]
    lane = lax.broadcasted_iota(jnp.int32, (1, pl.next_power_of_2(blocks)), 1)
    parts = masked_load(squares.at[*place, lane], inside & (lane < blocks))
    return lax.rsqrt(jnp.sum(parts, axis=1, keepdims=True) * (1.0 / width) + eps)


def add_to_stream(stream: Any, before: Any, block: Block) -> None:
    """Writes `h + y`, both rounded, and the sum of its squares over the block's columns."""
    dtype = stream.h.dtype
    y = block.values[0].astype(dtype).astype(jnp.float32)
    h = (block.load(before) + y).astype(dtype)
    block.store(stream.h, h)
    wide = jnp.where(block.inside, h.astype(jnp.float32), 0.0)
    square = jnp.sum(wide * wide, axis=1, keepdims=True)
    own = block.rows < before.shape[0]
    masked_store(stream.squares.at[block.rows, block.rows * 0 + block.number], square, own)
