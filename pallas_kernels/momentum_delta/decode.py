"""Decoding: up to 16 steps at once; each state is read once and written once, in place.

Computes the recurrence as it is written (docs/algorithm.md, section 1), step after step:

    m = mu m + eta k (S^T p - v)^T       s = alpha s - beta m       o = scale s^T q

    inputs   q, k, v, p, gates [B, T, ...], T at most 16; the memory [B, HV, K, V], float32 or
             of 16 bits (kept.py), computed with in float32
    outputs  o [B, T, HV, V] in v's dtype; the memory, in the place of the entering one
    grid     flat, blocks of V x HV x B: a block of V of one head a program

Why so: one program holds `[K, block]` of a head's memory and momentum in registers. Nothing but the
states is large, so that the floor is their 4 K V floats a head at the device's bandwidth.

Constraints: no gradient; api.py takes the chunk kernels where one is asked for.

Run it alone: `python -m benchmarks decode`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import kernel_call
from pallas_kernels.momentum_delta.coefficients import inverse_norm
from pallas_kernels.momentum_delta.isolation import clean, times
from pallas_kernels.momentum_delta.kept import load_states, shapes_of, store_states
from pallas_kernels.momentum_delta.types import Leaf, Memory, Tokens
from pallas_kernels.tiling import DecodeTiles

MAX_STEPS = 16
"""Most steps in one call."""
SHORTER = 2.0**-30
"""By which q and k are multiplied before they are squared: elements of up to 2^86 fit into float32
then, and what epsilon does not hide stays."""


class Decoded(NamedTuple):
    """Results of the kernel.

    Attributes:
      o: outputs `[B, T, HV, V]` in v's dtype.
      memory: `[B, HV, K, V]`, in the place of the entering one.
    """

    o: Leaf
    memory: Memory


class DecodeOptions(NamedTuple):
    """What is fixed when the kernel is traced.

    Attributes:
      scale: factor on the output.
      normalize: l2-normalise q and k.
      tiles: block of V and warps.
      interpret: run the kernel in the interpreter, on any device.
    """

    scale: float
    normalize: bool
    tiles: DecodeTiles
    interpret: bool


def decode(x: Tokens, memory: Memory, options: DecodeOptions) -> Decoded:
    """The kernel on padded arrays.

    Args:
      x: tokens and gates, `T` at most `MAX_STEPS`, `K` a power of two, `V` a multiple of the block.
      memory: entering states.
      options: static.
    """
    z, block_v = x.sizes, options.tiles.block_v
    blocks = z.value_dim // block_v

    def spec(shape: tuple[int | None, ...], index: Callable[..., tuple]) -> pl.BlockSpec:
        def indices(program: jax.Array) -> tuple:
            rest, block = lax.div(program, blocks), lax.rem(program, blocks)
            return index(lax.div(rest, z.value_heads), lax.rem(rest, z.value_heads), block)

        return pl.BlockSpec(shape, indices)

    def keys(heads: int) -> pl.BlockSpec:
        share = z.value_heads // heads
        return spec((None, z.length, None, z.key_dim), lambda b, h, i: (b, 0, lax.div(h, share), 0))

    values = spec((None, z.length, None, block_v), lambda b, h, i: (b, 0, h, i))
    gate = spec((None, z.length, None), lambda b, h, i: (b, 0, h))
    state = spec((None, None, z.key_dim, block_v), lambda b, h, i: (b, h, 0, i))
    scale = spec((None, None, 2, block_v), lambda b, h, i: (b, h, 0, i))
    states = Memory(state, state, None if memory.scale is None else scale)
    p = None if x.p is None else keys(z.p_heads)
    entering = len(jax.tree.leaves(x))
    return kernel_call(
        partial(_decode, options=options),
        x,
        memory,
        name="mdn_decode",
        # flat, for CUDA allows 65,535 programs along the other dimensions
        grid=(z.batch * z.value_heads * blocks,),
        in_specs=[
            Tokens(keys(z.heads), keys(z.heads), values, p, gate, gate, gate, gate),
            states,
        ],
        out_specs=Decoded(values, states),
        out_shape=Decoded(z.per_head(z.value_dim, x.v.dtype), shapes_of(memory)),
        aliases={entering + i: 1 + i for i in range(len(jax.tree.leaves(memory)))},
        warps=options.tiles.warps,
        stages=1,
        interpret=options.interpret,
    )


def normalized(y: jax.Array, normalize: bool) -> jax.Array:
    """A query or key `[K]` in float32, l2-normalised or as it is."""
    y = y.astype(jnp.float32)
    if not normalize:
        return y
    short = SHORTER * y
    return short * inverse_norm(jnp.sum(short * short), SHORTER**2 * 1e-6)


def _decode(x, memory, out, *, options):
    def step(t: jax.Array | int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        s, m = carry
        q, k = (normalized(y[t, :], options.normalize) for y in (x.q, x.k))
        alpha, mu = jnp.exp(x.log_alpha[t]), jnp.exp(x.log_mu[t])
        p = alpha * k if x.p is None else x.p[t, :].astype(jnp.float32)
        seen = clean(jnp.sum(s * p[:, None], axis=0), (alpha == 0) & (mu == 0))
        w = seen - x.v[t, :].astype(jnp.float32)
        m = times(mu, m) + (x.eta[t] * k)[:, None] * w[None, :]
        s = times(alpha, s) - x.beta[t] * m
        o = options.scale * jnp.sum(s * q[:, None], axis=0)
        out.o[t, :] = o.astype(out.o.dtype)
        return s, m

    carry = load_states(memory)
    steps = x.q.shape[0]
    s, m = step(0, carry) if steps == 1 else lax.fori_loop(0, steps, step, carry)
    store_states(out.memory, s, m)
