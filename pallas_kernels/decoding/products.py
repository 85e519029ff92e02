"""Products of a few rows with matrices: what four of the five kernels of a layer share.

A matrix has a row for each output, so that what a program reads of it is in one piece. There are
two ways. For one row (and in float32, which tensor cores would round) a program loads all its
weights at once, before anything else, multiplies them by the inputs and sums along the lanes. For
more rows it walks along the width, with tensor cores, and the compiler's pipeline keeps loads on
their way. What stands before a product (a norm) and behind it (a residual) is the kernel's own.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.decoding.tiles import Tiles
from pallas_kernels.decoding.types import Leaf, Stream, like
from pallas_kernels.lowering import (
    dot,
    kernel_call,
    loads_so_far_are_issued,
    masked_load,
    masked_store,
)


class Inputs(NamedTuple):
    """Of some rows of the batch.

    Attributes:
      load: from the number and columns of a step, `[1 or rows, width]`, to the inputs there,
        `[rows, width]`, which go into the product as they are.
      factor: of the products of a step, `[rows]`; None: 1.
      last: of the sums of all steps, `[rows]`; loaded before the product; None: 1.
    """

    load: Callable[[Any, jax.Array], jax.Array]
    factor: Callable[[Any], jax.Array] | None = None
    last: Callable[[], jax.Array] | None = None


InputsOf = Callable[[jax.Array], Inputs]
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
      rows: of the batch, `[1, rows]`.
      outputs: their numbers, `[outputs, 1]`.
      inside: which of both there are, `[outputs, rows]`.
      values: for each matrix `[outputs, rows]` float32.
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
    inputs_of: InputsOf,
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
        inside = (outputs < product.outputs)[:, None] & (rows < product.batch)
        finish(Block(number, rows, outputs[:, None], inside, values))

    run = _by_dot if tiles.dot else _summed
    run(product, matrices, weights, first, inputs_of, done)


def _columns(step: jax.Array | int, width: int, lines: int = 1) -> jax.Array:
    return step * width + lax.broadcasted_iota(jnp.int32, (lines, width), 1)


def _by_dot(
    product: Product,
    matrices: Sequence[Matrix],
    weights: Callable[..., jax.Array],
    first: jax.Array,
    inputs_of: InputsOf,
    done: Callable[..., None],
) -> None:
    tiles = product.tiles
    inputs = inputs_of(first + lax.broadcasted_iota(jnp.int32, (tiles.rows, 1), 0))

    def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x = inputs.load(i, _columns(i, tiles.width)).T
        parts = [dot(weights(matrix, i), x, None) for matrix in matrices]  # [outputs, rows]
        if inputs.factor is not None:
            factor = inputs.factor(i)[None, :]
            parts = [factor * part for part in parts]
        return tuple(total + part for total, part in zip(sums, parts, strict=True))

    sums = (jnp.zeros((tiles.outputs, tiles.rows), jnp.float32),) * len(matrices)
    sums = lax.fori_loop(0, product.width // tiles.width, step, sums)
    if inputs.last is not None:
        last = inputs.last()[None, :]
        sums = tuple(last * total for total in sums)
    done(first + lax.broadcasted_iota(jnp.int32, (1, tiles.rows), 1), sums)


def _summed(
    product: Product,
    matrices: Sequence[Matrix],
    weights: Callable[..., jax.Array],
    first: jax.Array,
    inputs_of: InputsOf,
    done: Callable[..., None],
) -> None:
    tiles = product.tiles
    groups = product.width // (tiles.width * tiles.at_once)
    # a row of the batch for every output: inputs are loaded as weights are, to the same lanes
    lines = [jnp.full((tiles.outputs, 1), first + i) for i in range(tiles.rows)]

    def add(
        group: jax.Array | int, inputs: list[Inputs] | None, sums: tuple[jax.Array, ...]
    ) -> tuple[list[Inputs], tuple[jax.Array, ...]]:
        steps = [group * tiles.at_once + i for i in range(tiles.at_once)]
        arriving = [[weights(matrix, step) for matrix in matrices] for step in steps]
        # all of them before anything that the inputs need
        loads_so_far_are_issued(product.interpret)
        inputs = inputs or [inputs_of(rows) for rows in lines]
        for step, pieces in zip(steps, arriving, strict=True):
            columns = _columns(step, tiles.width, tiles.outputs)
            wide = [piece.astype(jnp.float32) for piece in pieces]
            products = []  # [outputs, width]
            for own in inputs:
                x = own.load(step, columns).astype(jnp.float32)
                if own.factor is not None:
                    x *= own.factor(step)[:, None]
                products += [w * x for w in wide]
            sums = tuple(map(lax.add, sums, products)) if sums else tuple(products)
        return inputs, sums

    if groups == 1:
        inputs, sums = add(0, None, ())
    else:
        inputs = [inputs_of(rows) for rows in lines]
        zeros = jnp.zeros((tiles.outputs, tiles.width), jnp.float32)
        sums = (zeros,) * (tiles.rows * len(matrices))
        sums = lax.fori_loop(0, groups, lambda group, sums: add(group, inputs, sums)[1], sums)
    for i, own in enumerate(inputs):
        totals = [jnp.sum(x, axis=1) for x in sums[i * len(matrices) : (i + 1) * len(matrices)]]
        if own.last is not None:
            last = own.last()
            totals = [last * total for total in totals]
        row = first + i + jnp.zeros((1, 1), jnp.int32)
        done(row, tuple(total[:, None] for total in totals))


def of_rows(reference: Any, rows: jax.Array, batch: int) -> Callable[[Any, jax.Array], jax.Array]:
    """Loads columns of some rows of `[B, _]`."""
    inside = rows < batch
    return lambda _, columns: masked_load(reference.at[rows, columns], inside & (columns >= 0))


def normalized(stream: Any, product: Product, eps: float) -> InputsOf:
    """Inputs of a product behind the norm of the residual stream.

    The scale of the norm is in the weights, and the root is a factor of the sums, so that the
    stream goes into the product as it is.

    Args:
      stream: references to the residual stream and its sums of squares.
      product: whose inputs.
      eps: inside the root.
    """

    def inputs_of(rows: jax.Array) -> Inputs:
        blocks = stream.squares.shape[1]
        lane = lax.broadcasted_iota(jnp.int32, (1, pl.next_power_of_2(blocks)), 1)
        inside = (rows < product.batch) & (lane < blocks)
        parts = masked_load(stream.squares.at[rows, lane], inside)

        def last() -> jax.Array:
            return lax.rsqrt(jnp.sum(parts, axis=1) * (1.0 / product.width) + eps)

        return Inputs(of_rows(stream.h, rows, product.batch), last=last)

    return inputs_of


def onto_stream(
    product: Product,
    name: str,
    h: Leaf,
    given: Any,
    weights: Leaf,
    inputs_of: Callable[[Any, jax.Array], Inputs],
) -> Stream:
    """The residual stream with a product added.

    Args:
      product: sizes and tiles.
      name: of the kernel.
      h: the stream before.
      given: arrays that the inputs are made of.
      weights: the matrix.
      inputs_of: from references to `given` and rows of the batch to their inputs.
    """

    def body(h: Any, given: Any, weights: Any, out: Any) -> None:
        def add(block: Block) -> None:
            _add_to_stream(out, h, block)

        multiply(product, [Matrix(weights, 0)], partial(inputs_of, given), add)

    out = Stream(like(h.shape, h.dtype), like((product.batch, product.blocks)))
    stream: Stream = product.call(body, h, given, weights, name=name, out_shape=out)
    return stream


def _add_to_stream(stream: Any, before: Any, block: Block) -> None:
    """Writes `h + y`, both rounded, and the sum of its squares over the block's columns."""
    dtype = stream.h.dtype
    y = block.values[0].astype(dtype).astype(jnp.float32)
    h = (block.load(before) + y).astype(dtype)
    block.store(stream.h, h)
    wide = jnp.where(block.inside, h.astype(jnp.float32), 0.0)
    square = jnp.sum(wide * wide, axis=0, keepdims=True)
    own = block.rows < before.shape[0]
    masked_store(stream.squares.at[block.rows, block.rows * 0 + block.number], square, own)
