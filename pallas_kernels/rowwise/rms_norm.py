"""Root mean square norm, plain or gated, backward (`rms_norm_bwd`).

Computes, with r = rsqrt(mean x^2 + eps), y = x r scale a(gate) and c = dy a(gate):

    dx     = r scale c - x r^3 mean(scale c x) + dr
    dgate  = dy x r scale a'(gate)              dscale = sum over rows of c x r

    inputs   x, dy and, where there are any, gate and dr, the gradient of x past the norm,
             [N, D]; scale [D]
    outputs  dx and dgate [N, D] in the dtypes of x and gate; the gradient of scale, one part for
             each program, [programs, D] float32; y, again, [N, D], where it is asked for
    grid     programs: each owns as many rows as the next

Why so: bytes are all that it costs. A row is loaded once, where XLA reads it for the statistics and
again for the gradients. Statistics are computed again: nothing but x and gate is kept. XLA sums the
parts of the gradient of scale in a fixed order, so a second run gives the same bits.

Constraints: `D` up to 8,192.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import kernel_call, masked_load, masked_store

MAX_WIDTH = 8192
_PROGRAMS = 528
"""Four a multiprocessor of an H100 or H200."""
_ELEMENTS = 2048
"""Of a program's rows at once: with four warps, 16 a lane."""
_WARPS = 4


class Norm(NamedTuple):
    """What is fixed of a norm.

    Attributes:
      eps: inside the root.
      activation: of the gate.
      again: whether the output is computed again, in dy's dtype.
      interpret: run the kernel in the interpreter, on any device.
    """

    eps: float
    activation: Literal["sigmoid", "silu"] = "sigmoid"
    again: bool = False
    interpret: bool = False


class _Inputs(NamedTuple):
    x: Any
    d_y: Any
    gate: Any | None
    d_past: Any | None


class _Outputs(NamedTuple):
    d_x: Any
    d_gate: Any | None
    y: Any | None
    d_scale: Any


def rms_norm_bwd(
    norm: Norm,
    x: jax.Array,
    scale: jax.Array,
    gate: jax.Array | None,
    d_y: jax.Array,
    d_past: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Gradients of `x / sqrt(mean x^2 + eps) * scale * activation(gate)`, over the last axis.

    Args:
      norm: what is fixed.
      x: inputs `[..., D]`.
      scale: `[D]`.
      gate: `[..., D]`; None: none.
      d_y: gradient of the output.
      d_past: gradient that reaches `x` past the norm, added to its own; None: none.

    Returns:
      Gradients of x, scale and gate, and the output if it is asked for.
    """
    width = x.shape[-1]
    rows = x.size // width
    lanes = pl.next_power_of_2(width)
    at_once = max(_ELEMENTS // lanes, 1)
    programs = min(_PROGRAMS, pl.cdiv(rows, at_once))
    inputs = _Inputs(
        *(None if a is None else a.reshape(rows, width) for a in (x, d_y, gate, d_past))
    )

    def like(a: jax.Array | None) -> jax.ShapeDtypeStruct | None:
        return None if a is None else jax.ShapeDtypeStruct((rows, width), a.dtype)

    shapes = _Outputs(
        d_x=like(x),
        d_gate=like(gate),
        y=like(d_y) if norm.again else None,
        d_scale=jax.ShapeDtypeStruct((programs, width), jnp.float32),
    )
    out = kernel_call(
        partial(_body, norm=norm, lanes=lanes, at_once=at_once, programs=programs),
        inputs,
        scale,
        name="rms_norm_bwd",
        grid=(programs,),
        in_specs=jax.tree.map(lambda _: pl.BlockSpec(), [inputs, scale]),
        out_specs=jax.tree.map(lambda _: pl.BlockSpec(), shapes),
        out_shape=shapes,
        warps=_WARPS,
        stages=1,
        interpret=norm.interpret,
    )

    def shaped(a: jax.Array | None) -> jax.Array | None:
        return None if a is None else a.reshape(x.shape)

    d_scale = out.d_scale.sum(axis=0).astype(scale.dtype)
    return out.d_x.reshape(x.shape), d_scale, shaped(out.d_gate), shaped(out.y)


def _body(
    inputs: Any, scale: Any, out: Any, *, norm: Norm, lanes: int, at_once: int, programs: int
) -> None:
    rows, width = inputs.x.shape
    program = pl.program_id(0)
    line = lax.broadcasted_iota(jnp.int32, (at_once, 1), 0)
    lane = lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
    weights = masked_load(scale.at[lane], lane < width).astype(jnp.float32)
    rounds = pl.cdiv(rows, programs * at_once)

    def step(i: jax.Array, d_scale: jax.Array) -> jax.Array:
        row = (i * programs + program) * at_once + line
        inside = (row < rows) & (lane < width)

        def load(reference: Any) -> jax.Array:
            return masked_load(reference.at[row, lane], inside).astype(jnp.float32)

        def store(reference: Any, values: jax.Array) -> None:
            masked_store(reference.at[row, lane], values.astype(reference.dtype), inside)

        x, d_y = load(inputs.x), load(inputs.d_y)
        inverse = lax.rsqrt(_mean(x * x, width) + norm.eps)
        scaled = x * inverse
        c, y = d_y, scaled * weights
        if inputs.gate is not None:
            value, slope = _activated(norm.activation)(load(inputs.gate))
            store(out.d_gate, d_y * y * slope)
            c, y = d_y * value, y * value
        d_x = inverse * (weights * c - scaled * _mean(weights * c * scaled, width))
        if inputs.d_past is not None:
            d_x += load(inputs.d_past)

        store(out.d_x, d_x)
        if out.y is not None:
            store(out.y, y)
        return d_scale + c * scaled

    parts = lax.fori_loop(0, rounds, step, jnp.zeros((at_once, lanes)))
    total = jnp.sum(parts, axis=0, keepdims=True)
    first = lax.broadcasted_iota(jnp.int32, (1, 1), 0) + program
    masked_store(out.d_scale.at[first, lane], total, lane < width)


def _mean(x: jax.Array, width: int) -> jax.Array:
    return jnp.sum(x, axis=1, keepdims=True) * (1.0 / width)


def _activated(name: str) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """The value and the slope of an activation."""

    def sigmoid(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = _sigmoid(x)
        return value, value * (1.0 - value)

    def silu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        gate = _sigmoid(x)
        return x * gate, gate * (1.0 + x * (1.0 - gate))

    return {"sigmoid": sigmoid, "silu": silu}[name]


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp(-x))
