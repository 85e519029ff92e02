"""Between the projections of a mixer: convolutions, gates and the rule (`mdn_decode_mixer`).

Computes for one token, with the convolutions over the ring of the last W inputs:

    q, k, v = silu(bias + sum_w taps_w x_(t - W + 1 + w));    q -= correction k
    m = mu m + eta k (S^T p - v)^T       s = alpha s - beta m       o = scale s^T q
    gated = o * norm scale * sigmoid(gate)

    inputs   y [B, ...] and gates [B, ...] of the projections; taps [W, channels], bias; the gates'
             parameters [HV]; slot [B], where the ring begins; active [B]; the states [B, HV, K, V]
             float32 or bfloat16 and the ring [B, W, channels]
    outputs  gated [B, HV V] in the compute dtype; sums of the squares of o, rounded to it,
             [B, HV, blocks] float32; states and ring, in their places
    grid     flat, blocks of V x HV x B: a block of V of one head of one row a program

Why so: the states are the bytes; each is read once and written once. Programs of a head make its
query and key again, from the cache. None of them waits for another: what a tap reads nobody writes,
for the new input takes the slot of the one that no tap sees any more.

What the gated norm of a head still lacks is the factor that all of its V columns share.

A row that is not active stays as it is; its output is zero.

Constraints: K a power of two; V a multiple of the block. Run it alone: `python -m benchmarks
decoding`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.decoding.projections import Projected
from pallas_kernels.decoding.tiles import mixer_tiles
from pallas_kernels.decoding.types import Gates, LayerMemory, LayerWeights, Leaf, Plan, like
from pallas_kernels.lowering import kernel_call, loads_so_far_are_issued
from pallas_kernels.momentum_delta.coefficients import inverse_norm
from pallas_kernels.momentum_delta.decode import SHORTER
from pallas_kernels.momentum_delta.isolation import clean, times

NAME = "mdn_decode_mixer"
_LARGEST_BETA = 2.0
"""Of the stable bound."""


class Mixed(NamedTuple):
    """Outputs of the rule.

    Attributes:
      gated: o times the scale of its norm and its gate, `[B, HV V]` in the compute dtype.
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
    shipped = mixer_tiles(plan.key_dim, plan.value_dim, batch * plan.value_heads)
    tiles = plan.tiles_of(NAME, shipped)
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
                like((batch, plan.values), projected.y.dtype),
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
    columns = pl.ds(head * plan.value_dim + block * block_v, block_v)
    values = pl.ds(block * block_v, block_v)
    # nothing waits for anything here, nor for whether the row is active: all is on its way at once
    entering = memory.s[row, head, :, values], memory.m[row, head, :, values]
    loads_so_far_are_issued(plan.interpret)
    active = x.active[row] != 0
    step = _rule(x, memory.tail, out.memory.tail, *entering, (row, head, block), plan, block_v)
    norm, gate = x.norm[values], None
    if plan.gated:
        gates = pl.ds(plan.channels + head * plan.value_dim + block * block_v, block_v)
        gate = x.projected.y[row, gates]
    loads_so_far_are_issued(plan.interpret)

    @pl.when(active)
    def _step() -> None:
        after, o = step()
        o = _rounded(o, x.projected.y.dtype)
        out.mixed.squares[row, head, block] = jnp.sum(o * o)
        o *= norm.astype(jnp.float32)
        gated = o if gate is None else o * _sigmoid(gate.astype(jnp.float32))
        out.mixed.gated[row, columns] = gated.astype(out.mixed.gated.dtype)
        for new, kept in zip(after, (out.memory.s, out.memory.m), strict=True):
            kept[row, head, :, values] = new.astype(kept.dtype)

    @pl.when(jnp.logical_not(active))
    def _idle() -> None:
        out.mixed.gated[row, columns] = jnp.zeros((block_v,), out.mixed.gated.dtype)
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
) -> Callable[[], tuple[tuple[jax.Array, jax.Array], jax.Array]]:
    """Loads what a step needs beside its states; makes the new ones and the output then."""
    row, head, block = place
    group, dtype = plan.value_heads // plan.heads, x.projected.y.dtype
    key_head = lax.div(head, group)
    owns_keys = (block == 0) & (lax.rem(head, group) == 0)
    convolved = partial(_convolved, x, tail, new_tail, row, plan.conv_size)
    key, value = key_head * plan.key_dim, head * plan.value_dim + block * block_v
    make_gates = _gates(x.gates, x.projected.gates, row, head, plan)
    make_q = convolved(key, plan.key_dim, owns_keys)
    make_k = convolved(plan.keys + key, plan.key_dim, owns_keys)
    make_v = convolved(2 * plan.keys + value, block_v, None)
    correction = None if x.gates.correction is None else x.gates.correction[head]

    def step() -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        before_s, before_m = s.astype(jnp.float32), m.astype(jnp.float32)
        q, k, v, gates = make_q(), make_k(), make_v(), make_gates()
        if correction is not None:
            q = _rounded(q - correction * k, dtype)
        q, k = _unit(q), _unit(k)
        # an erase key of its own comes rounded to the rule
        p = gates.alpha * k if plan.erase_by_alpha else _rounded(k, dtype)
        dead = (gates.alpha == 0) & (gates.mu == 0)
        w = clean(jnp.sum(before_s * p[:, None], axis=0), dead) - v
        after_m = times(gates.mu, before_m) + (gates.eta * k)[:, None] * w[None, :]
        after_s = times(gates.alpha, before_s) - gates.beta * after_m
        o = plan.key_dim**-0.5 * jnp.sum(after_s * q[:, None], axis=0)
        return (after_s, after_m), o

    return step


def _convolved(
    x: Any,
    tail: Any,
    new_tail: Any,
    row: jax.Array,
    taps: int,
    column: jax.Array,
    size: int,
    owned: jax.Array | None,
) -> Callable[[], jax.Array]:
    """Loads some channels, and keeps their new inputs where owned; makes their outputs then."""
    channels, slot = pl.ds(column, size), x.slot[row]
    new = x.projected.y[row, channels]
    seen = [tail[row, lax.rem(slot + tap + 1, taps), channels] for tap in range(taps - 1)]
    factors = [x.taps[tap, channels] for tap in range(taps)]
    bias = None if x.bias is None else x.bias[channels]

    def keep() -> None:
        new_tail[row, slot, channels] = new

    def make() -> jax.Array:
        if owned is None:
            keep()
        else:
            pl.when(owned)(keep)
        total = jnp.zeros((size,), jnp.float32) if bias is None else bias
        for inputs, factor in zip([*seen, new], factors, strict=True):
            total += inputs.astype(jnp.float32) * factor
        total = _rounded(total, new.dtype)
        return _rounded(total * _sigmoid(total), new.dtype)

    return make


def _gates(
    gates: Any, projected: Any, row: jax.Array, head: jax.Array, plan: Plan
) -> Callable[[], _Gated]:
    """Loads what a head's gates need; makes them then, as `mdn_jax.layers.gates` has them."""
    own: Gates = jax.tree.map(lambda parameter: parameter[head], gates)
    count = 3 if own.momentum_rate is None else 4
    a, b, e, *m = (projected[row, i * plan.value_heads + head] for i in range(count))
    stable = own.step_bias is not None

    def make() -> _Gated:
        eta = 1.0 + jnp.tanh(e / plan.tau)
        log_alpha = -own.rate * _softplus(a + own.rate_bias)
        mu = jnp.zeros((), jnp.float32)
        if own.momentum_rate is not None:
            log_mu = -own.momentum_rate * _softplus(m[0] + own.momentum_bias)
            if plan.min_log_mu is not None:
                log_mu = jnp.maximum(log_mu, plan.min_log_mu)
            mu = jnp.exp(log_mu - plan.least_decay if stable else log_mu)
        if stable:
            alpha = jnp.exp(log_alpha)
            edge = (1.0 - plan.margin) * (1.0 + alpha) * (1.0 + mu)
            erase = eta * alpha if plan.erase_by_alpha else eta
            most = jnp.minimum(edge / jnp.maximum(erase, 0.5), _LARGEST_BETA)
            return _Gated(alpha, mu, _sigmoid(b + own.step_bias) * most, eta)
        assert own.factor is not None  # without a step bias
        tangent = eta * own.factor
        square = tangent * tangent
        beta = _sigmoid(b)
        if plan.bound in ("published", "beta"):
            beta *= square / (1.0 + square)
        if plan.bound in ("published", "alpha"):
            log_alpha -= jnp.log1p(square)
        return _Gated(jnp.exp(log_alpha), mu, beta, eta)

    return make


def _unit(x: jax.Array) -> jax.Array:
    short = SHORTER * x
    return short * inverse_norm(jnp.sum(short * short), SHORTER**2 * 1e-6)


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    return x.astype(dtype).astype(jnp.float32)


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def _softplus(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))
