"""Short convolutions, backward (`causal_conv1d_bwd`).

Computes, with s the sum before silu:

    ds_t      = dy_t silu'(s_t)
    dx_t      = sum_d taps_(W - 1 - d) ds_(t + d)       while t + d is of t's document
    d_taps_w  = sum_t ds_t x_(t - W + 1 + w)            d_bias = sum_t ds_t

    inputs   as the forward kernel, and dy [B, T, C] of each branch
    outputs  dx as x and d_tail [B, W - 1, C] of each branch, in x's dtype; the gradients of taps
             and bias, one part for each span, [B, spans, W or W + 1, blocks of channels]
             float32 (the bias, where there is one, is the last row)
    grid     as the forward kernel

Why so: a program walks forward along its strips, W - 1 steps beyond their ends. It computes s once
more from the last inputs, and keeps the gradients of the last W - 1 inputs until no later step adds
to them: x and dy are loaded once, and dx is written once. Parts of the gradients of the taps are
summed by XLA in a fixed order, so a second run gives the same bits.

Constraints: up to 8 taps.

Run it alone: `python -m benchmarks convolution`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import kernel_call
from pallas_kernels.short_convolution.strips import (
    Strips,
    Window,
    on_own_strips,
    seen,
    sigmoid,
    weighted,
)
from pallas_kernels.short_convolution.types import Branch, Options, Plan


class Gradients(NamedTuple):
    """What the kernel writes.

    Attributes:
      x: of each branch `[B, T, C]`; or one, of the joined inputs.
      tail: of each branch `[B, W - 1, C]`; None where there is no tail.
      parameters: `[B, spans, W, channels of all blocks]` float32; a row more with a bias, the last.
    """

    x: tuple[Any, ...]
    tail: tuple[Any | None, ...]
    parameters: Any


class _Walk(NamedTuple):
    """What a program carries from step to step.

    Attributes:
      window: the last `W - 1` inputs.
      begun: whether a document began at the last `W - 2` steps, the last first, `[strips, 1]`.
      unfinished: gradients of the last `W - 1` inputs, the last first.
      taps: gradients of the taps.
      bias: gradient of the bias; None where the branch has none.
    """

    window: Window
    begun: tuple[jax.Array, ...]
    unfinished: tuple[jax.Array, ...]
    taps: tuple[jax.Array, ...]
    bias: jax.Array | None


def backward(
    joined: jax.Array | None,
    branches: tuple[Branch, ...],
    starts: jax.Array | None,
    d_y: tuple[jax.Array, ...],
    options: Options,
) -> tuple[jax.Array | None, tuple[Branch, ...]]:
    """The gradients of the joined inputs and of each branch."""
    plan = Plan.of(joined, branches, options.tiles)
    inputs = [b.x for b in branches] if joined is None else [joined]

    def like(x: jax.Array | None) -> jax.ShapeDtypeStruct | None:
        return None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype)

    channels = sum(plan.blocks) * plan.tiles.channels
    with_bias = any(branch.bias is not None for branch in branches)
    parts = (plan.batch, plan.spans, plan.taps + with_bias, channels)
    shapes = Gradients(
        tuple(map(like, inputs)),
        tuple(like(b.tail) for b in branches),
        jax.ShapeDtypeStruct(parts, jnp.float32),
    )
    gradients = kernel_call(
        partial(_backward, plan=plan, activation=options.activation),
        joined,
        branches,
        starts,
        d_y,
        name="short_convolution_bwd",
        grid=plan.grid,
        in_specs=jax.tree.map(lambda _: pl.BlockSpec(), [joined, branches, starts, d_y]),
        out_specs=jax.tree.map(lambda _: pl.BlockSpec(), shapes),
        out_shape=shapes,
        warps=plan.tiles.warps,
        stages=1,
        interpret=options.interpret,
    )
    parameters, first, results = gradients.parameters.sum(axis=(0, 1)), 0, []
    own_x = gradients.x if joined is None else (None,) * len(branches)
    for branch, d_x, d_tail, blocks in zip(
        branches, own_x, gradients.tail, plan.blocks, strict=True
    ):
        own = parameters[:, first : first + branch.taps.shape[1]]
        d_bias = None if branch.bias is None else own[plan.taps].astype(branch.bias.dtype)
        d_taps = own[: plan.taps].astype(branch.taps.dtype)
        results.append(Branch(d_x, d_tail, d_taps, d_bias))
        first += blocks * plan.tiles.channels
    return None if joined is None else gradients.x[0], tuple(results)


def _backward(
    joined: Any, branches: Any, starts: Any, d_y: Any, out: Any, *, plan: Plan, activation: bool
) -> None:
    def walk(index: int, strips: Strips, block: jax.Array) -> None:
        size, unroll, late = plan.taps, plan.tiles.unroll, plan.taps - 1
        taps, bias = strips.taps(), strips.bias()
        zeros = jnp.zeros((plan.tiles.strips, plan.tiles.channels))
        never = strips.first < 0
        d_x = out.x[index if joined is None else 0]

        def steps(i: jax.Array, walk: _Walk) -> _Walk:
            numbers = [i * unroll + j for j in range(unroll)]
            times = [strips.first + number for number in numbers]
            arrived = [
                (strips.inputs(t), strips.load(d_y[index], t), strips.begins(t)) for t in times
            ]
            finished = []
            for number, t, (x, d, begins) in zip(numbers, times, arrived, strict=True):
                inputs = (*seen(walk.window, begins), x)
                d_sum = d * _slope(weighted(inputs, taps, bias)) if activation else d
                own = jnp.where(number < plan.tiles.steps, d_sum, 0.0)  # the next has its own
                done, unfinished = _spread(d_sum, _crossed(begins, walk.begun), walk, taps)
                finished.append(done)
                # those of the strip before are its own, too, and a round may end too late
                owned = (number >= late) & (number < plan.tiles.steps + late)
                inside = owned & (t - late < plan.length)
                strips.store(d_x, t - late, done, inside, strips.column)
                walk = _Walk(
                    window=inputs[1:],
                    begun=(begins, *walk.begun)[: size - 2] if size > 2 else (),
                    unfinished=unfinished,
                    taps=tuple(d + own * x for d, x in zip(walk.taps, inputs, strict=True)),
                    bias=None if walk.bias is None else walk.bias + own,
                )
            if out.tail[index] is not None:
                _write_tail(strips, out.tail[index], numbers, finished)
            return walk

        end = lax.fori_loop(
            0,
            plan.rounds(ahead=late),
            steps,
            _Walk(
                window=strips.window(late),
                begun=(never,) * max(size - 2, 0),
                unfinished=(zeros,) * late,
                taps=(zeros,) * size,
                bias=None if bias is None else zeros,
            ),
        )
        lane = lax.broadcasted_iota(jnp.int32, (plan.tiles.channels,), 0)
        columns = block * plan.tiles.channels + lane
        parts = end.taps if end.bias is None else (*end.taps, end.bias)
        for i, part in enumerate(parts):
            out.parameters[strips.row, strips.span, i, columns] = jnp.sum(part, axis=0)

    on_own_strips(joined, branches, starts, plan, walk)


def _slope(x: jax.Array) -> jax.Array:
    """The derivative of silu."""
    gate = sigmoid(x)
    return gate * (1.0 + x * (1.0 - gate))


def _crossed(begins: jax.Array, begun: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Whether a document began since the input 1, 2, ... steps ago, `[strips, 1]` each."""
    crossed = [begins]
    for before in begun:
        crossed.append(crossed[-1] | before)
    return crossed


def _spread(
    d_sum: jax.Array, crossed: list[jax.Array], walk: _Walk, taps: list[jax.Array]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Adds a step's part to the gradients of the inputs that it saw.

    Returns:
      The gradient of the input `W - 1` steps ago, which is complete, and the unfinished ones.
    """
    gradients = [d_sum * taps[-1]]
    for d_x, apart, tap in zip(walk.unfinished, crossed, taps[-2::-1], strict=False):
        gradients.append(d_x + jnp.where(apart, 0.0, d_sum) * tap)
    return gradients[-1], tuple(gradients[:-1])


def _write_tail(
    strips: Strips, d_tail: Any, numbers: list[jax.Array], finished: list[jax.Array]
) -> None:
    """Stores the gradients of the tail, if this round has completed some."""
    late = d_tail.shape[1]

    @pl.when((numbers[0] < late) & (strips.span == 0))
    def _() -> None:
        for number, gradient in zip(numbers, finished, strict=True):
            steps = strips.first + number
            strips.store(d_tail, steps, gradient, steps < late)
