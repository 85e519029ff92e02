"""Between the projections of a mixer: convolutions, gates and the rule (`mdn_decode_mixer`).

Computes for one token, with the convolutions over the ring of the last W inputs:

    q, k, v = silu(bias + sum_w taps_w x_(t - W + 1 + w));    q -= correction k
    m = mu m + eta k (S^T p - v)^T       s = alpha s - beta m       o = scale s^T q
    gated = o * norm scale * sigmoid(gate)

    inputs   y [B, ...] and gates [B, ...] of the projections; taps [W, channels], bias; the gates'
             parameters [HV]; slot [B], where the ring begins; active [B]; the states [B, HV, K, V]
             float32 and the ring [B, W, channels]
    outputs  gated [B, HV V] float32; sums of the squares of o, rounded to the compute dtype,
             [B, HV, blocks]; states and ring, in their places
    grid     flat, blocks of V x HV x B: a block of V of one head of one row a program

Why so: the states are the bytes; each is read once and written once. Programs of a head make its
query and key again, from the cache. None of them waits for another: what a tap reads nobody writes,
for the new input takes the slot of the one that no tap sees any more.

What the gated norm of a head still lacks is the factor that all of its V columns share.

A row that is not active stays as it is; its output is zero.

Constraints: K a power of two; V a multiple of the block. Run it alone: `python -m benchmarks
decoding`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.decoding.projections import Projected
from pallas_kernels.decoding.types import Gates, LayerMemory, LayerWeights, Leaf, Plan, like
from pallas_kernels.lowering import kernel_call
from pallas_kernels.momentum_delta.coefficients import inverse_norm
from pallas_kernels.momentum_delta.decode import SHORTER
from pallas_kernels.momentum_delta.isolation import clean, times
from pallas_kernels.tiling import decode_tiles

NAME = "mdn_decode_mixer"
_LARGEST_BETA = 2.0
"""Of the stable bound."""


class Mixed(NamedTuple):
    """Outputs of the rule.

    Attributes:
      gated: o times the scale of its norm and its gate, `[B, HV V]` float32.
      squares: sums of the squares of some columns of o of a head each, `[B, HV, blocks]` float32.
    """

    gated: Leaf
    squares: Leaf


class _Inputs(NamedTuple):
    projected: Projected
    taps: Leaf
    bias: Leaf | None
    gates: Gates
    norm: Leaf
    slot: Leaf
    active: Leaf


class _Outputs(NamedTuple):
    mixed: Mixed
    memory: LayerMemory


class _Gated(NamedTuple):
    """Gates of a head and a token, float32."""

    alpha: jax.Array
    mu: jax.Array
    beta: jax.Array
    eta: jax.Array


def mixer(
    projected: Projected,
    weights: LayerWeights,
    memory: LayerMemory,
    slot: Leaf,
    active: Leaf,
    plan: Plan,
) -> tuple[Mixed, LayerMemory]:
    """The kernel on whole arrays; the memory's are overwritten."""
    batch = slot.shape[0]
    tiles = decode_tiles(plan.key_dim, plan.value_dim, batch * plan.value_heads)
    blocks = plan.value_dim // tiles.block_v
    inputs = _Inputs(
        projected,
        weights.taps,
        weights.bias,
        weights.gates,
        weights.output_norm,
        slot,
        active,
    )
    first = len(jax.tree.leaves(inputs))
    out: _Outputs = kernel_call(
        partial(_mixer, plan=plan, blocks=blocks, block_v=tiles.block_v),
        inputs,
        memory,
        name=NAME,
        # flat, for CUDA allows 65,535 programs along the other dimensions
        grid=(batch * plan.value_heads * blocks,),
        in_specs=jax.tree.map(lambda _: pl.BlockSpec(), [inputs, memory]),
        out_specs=_Outputs(
            Mixed(pl.BlockSpec(), pl.BlockSpec()), LayerMemory(*(pl.BlockSpec(),) * 3)
        ),
        out_shape=_Outputs(
            Mixed(
                like((batch, plan.values)),
                like((batch, plan.value_heads, blocks)),
            ),
            LayerMemory(*(like(x.shape, x.dtype) for x in memory)),
        ),
        aliases={first + i: 2 + i for i in range(3)},
        warps=tiles.warps,
        stages=1,
        interpret=plan.interpret,
    )
    return out.mixed, out.memory


def _mixer(x: Any, memory: Any, out: Any, *, plan: Plan, blocks: int, block_v: int) -> None:
    rest, block = lax.div(pl.program_id(0), blocks), lax.rem(pl.program_id(0), blocks)
    row, head = lax.div(rest, plan.value_heads), lax.rem(rest, plan.value_heads)
    active = x.active[row] != 0
    columns = pl.ds(head * plan.value_dim + block * block_v, block_v)

    @pl.when(active)
    def _step() -> None:
        values = pl.ds(block * block_v, block_v)
        s, m = memory.s[row, head, :, values], memory.m[row, head, :, values]
        s, m, o = _rule(x, memory.tail, out.memory.tail, s, m, (row, head, block), plan, block_v)
        o = _rounded(o, x.projected.y.dtype)
        out.mixed.squares[row, head, block] = jnp.sum(o * o)
        o *= x.norm[values].astype(jnp.float32)
        if plan.gated:
            gate = pl.ds(plan.channels + head * plan.value_dim + block * block_v, block_v)
            o *= _sigmoid(x.projected.y[row, gate].astype(jnp.float32))
        out.mixed.gated[row, columns] = o
        out.memory.s[row, head, :, values], out.memory.m[row, head, :, values] = s, m

    @pl.when(jnp.logical_not(active))
    def _idle() -> None:
        out.mixed.gated[row, columns] = jnp.zeros((block_v,), jnp.float32)
        out.mixed.squares[row, head, block] = 0.0


def _rule(
    x: Any,
    tail: Any,
    new_tail: Any,
    s: jax.Array,
    m: jax.Array,
    place: tuple[jax.Array, jax.Array, jax.Array],
    plan: Plan,
    block_v: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """States and output of one step; writes the inputs that the program owns into the ring."""
    row, head, block = place
    group = plan.value_heads // plan.heads
    key_head = lax.div(head, group)
    owns_keys = (block == 0) & (lax.rem(head, group) == 0)
    slot = x.slot[row]

    def convolved(column: jax.Array, size: int, owned: jax.Array | None) -> jax.Array:
        channels = pl.ds(column, size)
        new = x.projected.y[row, channels]
        total = jnp.zeros((size,), jnp.float32) if x.bias is None else x.bias[channels]
        for tap in range(plan.conv_size - 1):
            seen = tail[row, lax.rem(slot + tap + 1, plan.conv_size), channels]
            total += seen.astype(jnp.float32) * x.taps[tap, channels]
        total += new.astype(jnp.float32) * x.taps[plan.conv_size - 1, channels]

        def keep() -> None:
            new_tail[row, slot, channels] = new

        if owned is None:
            keep()
        else:
            pl.when(owned)(keep)
        return _rounded(_silu(_rounded(total, new.dtype)), new.dtype)

    dtype = x.projected.y.dtype
    q = convolved(key_head * plan.key_dim, plan.key_dim, owns_keys)
    k = convolved(plan.keys + key_head * plan.key_dim, plan.key_dim, owns_keys)
    v = convolved(2 * plan.keys + head * plan.value_dim + block * block_v, block_v, None)
    if x.gates.correction is not None:
        q = _rounded(q - x.gates.correction[head] * k, dtype)
    q, k = _unit(q), _unit(k)
    gates = _gates(x.gates, x.projected.gates, row, head, plan)
    # an erase key of its own comes rounded to the rule
    p = gates.alpha * k if plan.erase_by_alpha else _rounded(k, dtype)
    dead = (gates.alpha == 0) & (gates.mu == 0)
    w = clean(jnp.sum(s * p[:, None], axis=0), dead) - v
    m = times(gates.mu, m) + (gates.eta * k)[:, None] * w[None, :]
    s = times(gates.alpha, s) - gates.beta * m
    return s, m, plan.key_dim**-0.5 * jnp.sum(s * q[:, None], axis=0)


def _gates(gates: Any, projected: Any, row: jax.Array, head: jax.Array, plan: Plan) -> _Gated:
    """As `mdn_jax.layers.gates.MomentumGates` has them."""
    a, b, e = (projected[row, i * plan.value_heads + head] for i in range(3))
    eta = 1.0 + _tanh(e / plan.tau)
    log_alpha = -gates.rate[head] * _softplus(a + gates.rate_bias[head])
    stable = gates.step_bias is not None
    mu = jnp.zeros((), jnp.float32)
    if gates.momentum_rate is not None:
        projection = projected[row, 3 * plan.value_heads + head] + gates.momentum_bias[head]
        log_mu = -gates.momentum_rate[head] * _softplus(projection)
        if plan.min_log_mu is not None:
            log_mu = jnp.maximum(log_mu, plan.min_log_mu)
        mu = jnp.exp(log_mu - plan.least_decay if stable else log_mu)
    if stable:
        alpha = jnp.exp(log_alpha)
        edge = (1.0 - plan.margin) * (1.0 + alpha) * (1.0 + mu)
        erase = eta * alpha if plan.erase_by_alpha else eta
        most = jnp.minimum(edge / jnp.maximum(erase, 0.5), _LARGEST_BETA)
        return _Gated(alpha, mu, _sigmoid(b + gates.step_bias[head]) * most, eta)
    tangent = eta * gates.factor[head]
    square = tangent * tangent
    beta = _sigmoid(b)
    if plan.bound in ("published", "beta"):
        beta *= square / (1.0 + square)
    if plan.bound in ("published", "alpha"):
        log_alpha -= jnp.log1p(square)
    return _Gated(jnp.exp(log_alpha), mu, beta, eta)


def _unit(x: jax.Array) -> jax.Array:
    short = SHORTER * x
    return short * inverse_norm(jnp.sum(short * short), SHORTER**2 * 1e-6)


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    return x.astype(dtype).astype(jnp.float32)


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def _silu(x: jax.Array) -> jax.Array:
    return x * _sigmoid(x)


def _softplus(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def _tanh(x: jax.Array) -> jax.Array:
    return jnp.tanh(x)
