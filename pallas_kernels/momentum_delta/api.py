"""Any shape on the kernels: padding, resets at document starts, tile choice."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.momentum_delta.coefficients import LOG_ZERO
from pallas_kernels.momentum_delta.decode import MAX_STEPS, DecodeOptions, decode
from pallas_kernels.momentum_delta.numerics import Numerics
from pallas_kernels.momentum_delta.replay import Replayed, Ring, replay
from pallas_kernels.momentum_delta.types import (
    CHUNK,
    Exchange,
    Leaf,
    Memory,
    Options,
    Sizes,
    Tokens,
)
from pallas_kernels.momentum_delta.vjp import rule
from pallas_kernels.tiling import (
    Tiles,
    choose_tiles,
    decode_tiles,
    padded_key_dim,
    padded_value_dim,
)


class _Call(NamedTuple):
    """What is fixed when a call is traced."""

    scale: float
    normalize: bool
    precise: bool
    tiles: Tiles | None
    pieces: int | None
    capability: tuple[int, int]
    native: bool
    interpret: bool
    exchange: Exchange | None


def momentum_delta(
    x: Tokens,
    memory: Memory | None,
    *,
    starts: jax.Array | None,
    scale: float,
    normalize: bool,
    precise: bool = False,
    tiles: Tiles | None = None,
    pieces: int | None = None,
    capability: tuple[int, int] = (9, 0),
    native: bool = False,
    interpret: bool = False,
    exchange: Exchange | None = None,
    seams: Leaf | None = None,
) -> tuple[jax.Array, Memory]:
    """The momentum delta rule on the Pallas kernels, differentiable in every array.

    Up to `MAX_STEPS` steps are one call of the decode kernel, unless they are differentiated.

    Args:
      x: tokens and gates, any `T`, `K <= 256`, `V <= 512`.
      memory: entering states; None stands for zeros. Up to `MAX_STEPS` steps in Pallas take
        states of 16 bits, and give such, without gradients.
      starts: `[B, T]` bool, the first step of each document but a row's first; or None.
      scale: factor on the output.
      normalize: l2-normalise q and k.
      precise: of bfloat16 inputs: the chunk kernels keep and hand on float32.
      tiles: of the chunk kernels; None: chosen for the shape.
      pieces: that the state passes cut a row in; None: chosen for the shape.
      capability: compute capability of the device.
      native: the decode kernel in Triton's own language (jax-triton) instead of Pallas.
      interpret: run the Pallas kernels in the interpreter.
      exchange: where every device has a stretch of each row, more than `MAX_STEPS` steps long;
        `memory`, which is then given, is that before the row. None: rows are whole.
      seams: what `exchange` is told.

    Returns:
      Outputs `[B, T, HV, V]` in v's dtype and the final states.
    """
    call = _Call(scale, normalize, precise, tiles, pieces, capability, native, interpret, exchange)
    x = _reset(x, starts)
    if x.sizes.length <= MAX_STEPS:
        return _steps(call, x, memory)
    return _chunks(call, x, memory, seams)


def replay_step(
    x: Tokens,
    memory: Memory,
    ring: Ring,
    active: jax.Array,
    *,
    scale: float,
    normalize: bool,
    interpret: bool = False,
) -> Replayed:
    """One step by the states of some steps ago and the steps since (replay.py).

    Args:
      x: tokens and gates of one step; dims that need no padding.
      memory: states, float32 or of 16 bits.
      ring: the steps since.
      active: rows whose step counts, `[B, 1]` int32, 1 or 0.
      scale: factor on the output.
      normalize: l2-normalise q and k.
      interpret: run the kernel in the interpreter.
    """
    z = x.sizes
    tiles = decode_tiles(z.key_dim, z.value_dim, z.batch * z.value_heads)
    return replay(x, memory, ring, active, DecodeOptions(scale, normalize, tiles, interpret))


def _chunks(
    call: _Call, x: Tokens, memory: Memory | None, seams: Leaf | None = None
) -> tuple[jax.Array, Memory]:
    """On the chunk kernels."""
    z = x.sizes
    key_dim, value_dim = padded_key_dim(z.key_dim), padded_value_dim(z.value_dim)
    tiles = call.tiles or choose_tiles(
        key_dim,
        value_dim,
        x.q.dtype.itemsize,
        call.capability,
        explicit_p=x.p is not None,
        precise=call.precise,
        heads=z.batch * z.value_heads,
        chunks=pl.cdiv(z.length, CHUNK),
        pieces=call.pieces,
        stretches=call.exchange is not None,
    )
    x, memory = _pad(x, memory, -z.length % CHUNK)
    numerics = Numerics(x.q.dtype, call.precise, call.interpret)
    options = Options(call.scale, call.normalize, tiles, numerics, call.exchange)
    return _cut(*rule(options, x, memory, seams), z)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _steps(call: _Call, x: Tokens, memory: Memory | None) -> tuple[jax.Array, Memory]:
    """On the decode kernel; the chunk kernels take over where a gradient is asked for."""
    z = x.sizes
    entering: Memory = memory or jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), z.memory)
    x, entering = _pad(x, entering, 0)
    padded = x.sizes
    tiles = decode_tiles(padded.key_dim, padded.value_dim, z.batch * z.value_heads)
    options = DecodeOptions(call.scale, call.normalize, tiles, call.interpret)
    if call.native:
        from pallas_kernels.momentum_delta import decode_triton

        return _cut(*decode_triton.decode(x, entering, options), z)
    return _cut(*decode(x, entering, options), z)


def _steps_forward(
    call: _Call, x: Tokens, memory: Memory | None
) -> tuple[tuple[jax.Array, Memory], Any]:
    if memory is not None and memory.s.dtype != jnp.float32:
        raise ValueError(
            "initial_state: expected float32 states where a gradient is asked for, "
            f"got {memory.s.dtype.name}"
        )
    return jax.vjp(partial(_chunks, call), x, memory)


def _steps_backward(
    call: _Call, pullback: Any, cotangents: tuple[jax.Array, Memory]
) -> tuple[Tokens, Memory | None]:
    gradients: tuple[Tokens, Memory | None] = pullback(cotangents)
    return gradients


_steps.defvjp(_steps_forward, _steps_backward)


def _reset(x: Tokens, starts: jax.Array | None) -> Tokens:
    """Gates of zero at the first step of a document: it sees no state, and exactly none."""
    if starts is None:
        return x
    log_alpha, log_mu = (
        jnp.where(starts[:, :, None], LOG_ZERO, y) for y in (x.log_alpha, x.log_mu)
    )
    p = None if x.p is None else jnp.where(starts[:, :, None, None], 0, x.p)
    return x._replace(p=p, log_alpha=log_alpha, log_mu=log_mu)


def _pad[M: Memory | None](x: Tokens, memory: M, steps: int) -> tuple[Tokens, M]:
    """Appends steps that leave the states as they are, and zeros to keys, values and states."""
    z = x.sizes
    key_dim = padded_key_dim(z.key_dim) - z.key_dim
    value_dim = padded_value_dim(z.value_dim) - z.value_dim

    def pad(y: jax.Array, width: int = 0) -> jax.Array:
        if not steps and not width:
            return y
        margin = [(0, 0), (0, steps), (0, 0), (0, width)][: y.ndim]
        return jnp.pad(y, margin)

    if memory is not None and (key_dim or value_dim):
        margin = ((0, 0), (0, 0), (0, key_dim), (0, value_dim))
        s, m = (jnp.pad(y, margin) for y in memory[:2])
        scale = None if memory.scale is None else pad(memory.scale, value_dim)
        memory = memory._replace(s=s, m=m, scale=scale)
    return Tokens(
        pad(x.q, key_dim),
        pad(x.k, key_dim),
        pad(x.v, value_dim),
        None if x.p is None else pad(x.p, key_dim),
        *(pad(gate) for gate in x[4:]),
    ), memory


def _cut(o: jax.Array, memory: Memory, z: Sizes) -> tuple[jax.Array, Memory]:
    """Without what `_pad` appended."""
    s, m = (y[:, :, : z.key_dim, : z.value_dim] for y in memory[:2])
    scale = None if memory.scale is None else memory.scale[..., : z.value_dim]
    memory = Memory(s, m, scale)
    return o[:, : z.length, :, : z.value_dim], memory
