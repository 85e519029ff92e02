"""Short convolutions, forward (`causal_conv1d_fwd`).

Computes, for every channel and step t of a document:

    y_t = silu(bias + sum_w taps_w x_(t - W + 1 + w))

    inputs   of each branch x [B, T, C], tail [B, W - 1, C], taps [W, C], bias [C]; or x of all
             branches along the channels, [B, T, sum of C]; starts [B, T]
    outputs  of each branch y [B, T, C] in x's dtype
    grid     flat, blocks of channels of all branches x spans x B: some strips of time of a block

Why so: bytes are all that it costs. A program walks along its strips and keeps the last W - 1
inputs in registers, so that each is loaded once. Where a document starts they become zero: no tap
needs a mask of its own. Queries, keys and values are one launch: none of them alone fills the
device to the end.

Constraints: up to 8 taps.

Run it alone: `python -m benchmarks convolution`.
"""

from functools import partial
from typing import Any

import jax
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


def forward(
    joined: jax.Array | None,
    branches: tuple[Branch, ...],
    starts: jax.Array | None,
    options: Options,
) -> tuple[jax.Array, ...]:
    """Outputs `[B, T, C]` of each branch, in x's dtype."""
    plan = Plan.of(joined, branches, options.tiles)
    dtype = (branches[0].x if joined is None else joined).dtype
    shapes = tuple(
        jax.ShapeDtypeStruct((plan.batch, plan.length, width), dtype) for width in plan.widths
    )
    outputs: tuple[jax.Array, ...] = kernel_call(
        partial(_forward, plan=plan, activation=options.activation),
        joined,
        branches,
        starts,
        name="short_convolution_fwd",
        grid=plan.grid,
        in_specs=jax.tree.map(lambda _: pl.BlockSpec(), [joined, branches, starts]),
        out_specs=tuple(pl.BlockSpec() for _ in shapes),
        out_shape=shapes,
        warps=plan.tiles.warps,
        stages=1,
        interpret=options.interpret,
    )
    return outputs


def _forward(
    joined: Any, branches: Any, starts: Any, out: Any, *, plan: Plan, activation: bool
) -> None:
    def walk(index: int, strips: Strips, _: jax.Array) -> None:
        taps, bias, unroll = strips.taps(), strips.bias(), plan.tiles.unroll
        always = strips.first >= 0

        def steps(i: jax.Array, window: Window) -> Window:
            times = [strips.first + i * unroll + j for j in range(unroll)]
            arrived = [(t, strips.inputs(t), strips.begins(t)) for t in times]
            for t, x, begins in arrived:
                inputs = (*seen(window, begins), x)
                y = weighted(inputs, taps, bias)
                if activation:
                    y = y * sigmoid(y)
                strips.store(out[index], t, y, always & (t < plan.length))
                window = inputs[1:]
            return window

        lax.fori_loop(0, plan.rounds(), steps, strips.window(plan.taps - 1))

    on_own_strips(joined, branches, starts, plan, walk)
