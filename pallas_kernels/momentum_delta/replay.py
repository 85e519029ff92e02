"""Decoding that writes the states every L steps: two kernels a step.

Beside the states of some steps ago, S0 and M0, there is a ring of the steps since: keys, written
values `v' = v - seen` and gates. One step reads both states and appends itself:

    seen = (a S0 - b M0)^T p + sum_j G_j (k_j . p) v'_j          a, b, G before the step
    o    = scale ((a S0 - b M0)^T q + sum_j G_j (k_j . q) v'_j)  after it, itself included

A step that finds 2L - 1 others applies the oldest L to the states, as decode.py would have done it:

    m = mu m - eta k v'^T       s = alpha s - beta m

`mdn_replay_plan`, a program a head, does all that no column of V is needed for: it walks over the
gates of the steps since for a, b and G, multiplies the keys with p and q, appends key and gates.
`mdn_replay`, a program a block of V of a head, has the rest.

    inputs   q, k, v, p, gates [B, 1, ...]; the states, of any kind that decode.py takes; the ring
    outputs  o [B, 1, HV, V] in v's dtype; states and ring, in the place of the entering ones
    grids    heads of all rows; flat, blocks of V x HV x B

Why so: half of what a step of decode.py moves are states written. The ring is small beside them, of
8 steps about a twentieth. In one kernel every block of V walked over the gates by itself and waited
for it: 66 us for 64 rows, whatever the states' bytes (docs/notebook/2026-11-states.md).

No race: value heads that share a key head share the ring's keys. One of them writes the slot of
this step, which is never one of those that are read: a ring of 2L slots holds at most 2L - 1 steps.

Constraints: no gradient; one step; K and V as the kernels have them; 2L a power of two.

Run it alone: `python -m benchmarks decode --replay 8`.
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
from pallas_kernels.momentum_delta.decode import SHORTER, DecodeOptions, normalized
from pallas_kernels.momentum_delta.isolation import clean, times
from pallas_kernels.momentum_delta.kept import load_states, shapes_of, store_states
from pallas_kernels.momentum_delta.types import Leaf, Memory, Tokens

_PLAN_WARPS = 4


class Ring(NamedTuple):
    """The steps since the states were written.

    Attributes:
      keys: as they came, not normalised, `[B, H, 2L, K]` in k's dtype.
      v_new: written values, `[B, HV, 2L, V]` float32.
      gates: alpha, mu, beta, and eta times the inverse norm of the key, `[B, HV, 2L, 4]` float32.
      counts: the oldest step's slot, and how many there are, at most `2L - 1`; `[B, HV, 2]` int32.
    """

    keys: Leaf
    v_new: Leaf
    gates: Leaf
    counts: Leaf


class Replayed(NamedTuple):
    """Results of a step.

    Attributes:
      o: outputs `[B, 1, HV, V]` in v's dtype.
      memory: in the place of the entering one.
      ring: the same.
    """

    o: Leaf
    memory: Memory
    ring: Ring


class Plan(NamedTuple):
    """What `mdn_replay_plan` finds for a head.

    Attributes:
      keys: the erase key p and the query q as the rule uses them, `[B, HV, 2, K]` float32.
      weights: of the slots' `v'` in what is seen and in the output, `[B, HV, 2, 2L]` float32.
      factors: of `S0^T p` and `-M0^T p`, of `S0^T q` and `-M0^T q`, of the own `v'` in the output,
        and whether the step sees nothing; `[B, HV, 6]` float32.
      slots: of this step; the oldest's, or -1 where none is to be applied; `[B, HV, 2]` int32.
    """

    keys: Leaf
    weights: Leaf
    factors: Leaf
    slots: Leaf


class Appended(NamedTuple):
    """What `mdn_replay_plan` writes of the ring: all but the written values."""

    keys: Leaf
    gates: Leaf
    counts: Leaf


def replay(
    x: Tokens, memory: Memory, ring: Ring, active: jax.Array, options: DecodeOptions
) -> Replayed:
    """A step on padded arrays.

    Args:
      x: tokens and gates, one step, `K` a power of two, `V` a multiple of the block.
      memory: the states that the ring's steps go on from.
      ring: as of the class.
      active: rows whose step counts, `[B, 1]` int32: 1, or 0, where it leaves no trace.
      options: static.
    """
    plan, appended = _planned(x, ring, active, options)
    z, block_v = x.sizes, options.tiles.block_v
    blocks, slots = z.value_dim // block_v, ring.v_new.shape[2]
    share = z.value_heads // z.heads

    def spec(shape: tuple[int | None, ...], index: Callable[..., tuple]) -> pl.BlockSpec:
        def indices(program: jax.Array) -> tuple:
            rest, block = lax.div(program, blocks), lax.rem(program, blocks)
            return index(lax.div(rest, z.value_heads), lax.rem(rest, z.value_heads), block)

        return pl.BlockSpec(shape, indices)

    def of_head(*shape: int) -> pl.BlockSpec:
        zeros = (0,) * len(shape)
        return spec((None, None, *shape), lambda b, h, i: (b, h, *zeros))

    def of_block(rows: int) -> pl.BlockSpec:
        return spec((None, None, rows, block_v), lambda b, h, i: (b, h, 0, i))

    values = spec((None, 1, None, block_v), lambda b, h, i: (b, 0, h, i))
    state = of_block(z.key_dim)
    states = Memory(state, state, None if memory.scale is None else of_block(2))
    ring_keys = spec((None, None, slots, z.key_dim), lambda b, h, i: (b, lax.div(h, share), 0, 0))
    in_place = (memory, ring.v_new)
    o, (memory, v_new) = kernel_call(
        partial(_replay, options=options),
        in_place,
        x.v,
        plan,
        appended.keys,
        appended.gates,
        name="mdn_replay",
        # flat, for CUDA allows 65,535 programs along the other dimensions
        grid=(z.batch * z.value_heads * blocks,),
        in_specs=[
            (states, of_block(slots)),
            values,
            Plan(of_head(2, z.key_dim), of_head(2, slots), of_head(6), of_head(2)),
            ring_keys,
            of_head(slots, 4),
        ],
        out_specs=(values, (states, of_block(slots))),
        out_shape=(z.per_head(z.value_dim, x.v.dtype), shapes_of(in_place)),
        aliases={i: 1 + i for i in range(len(jax.tree.leaves(in_place)))},
        warps=options.tiles.warps,
        stages=1,
        interpret=options.interpret,
    )
    return Replayed(o, memory, Ring(appended.keys, v_new, appended.gates, appended.counts))


def _planned(
    x: Tokens, ring: Ring, active: jax.Array, options: DecodeOptions
) -> tuple[Plan, Appended]:
    z, slots = x.sizes, ring.keys.shape[2]
    share = z.value_heads // z.heads

    def spec(shape: tuple[int | None, ...], index: Callable[..., tuple]) -> pl.BlockSpec:
        def indices(program: jax.Array) -> tuple:
            return index(lax.div(program, z.value_heads), lax.rem(program, z.value_heads))

        return pl.BlockSpec(shape, indices)

    def keys(heads: int) -> pl.BlockSpec:
        group = z.value_heads // heads
        return spec((None, 1, None, z.key_dim), lambda b, h: (b, 0, lax.div(h, group), 0))

    def of_head(*shape: int) -> pl.BlockSpec:
        zeros = (0,) * len(shape)
        return spec((None, None, *shape), lambda b, h: (b, h, *zeros))

    def shape(*sizes: int, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((z.batch, z.value_heads, *sizes), dtype)

    gate = spec((None, 1, None), lambda b, h: (b, 0, h))
    ring_keys = spec((None, None, slots, z.key_dim), lambda b, h: (b, lax.div(h, share), 0, 0))
    appended = Appended(ring.keys, ring.gates, ring.counts)
    own = Appended(ring_keys, of_head(slots, 4), of_head(2))
    tokens = (x.q, x.k, x.p, *x[4:])
    result: tuple[Plan, Appended] = kernel_call(
        partial(_plan, normalize=options.normalize, value_heads=z.value_heads, share=share),
        appended,
        tokens,
        active,
        name="mdn_replay_plan",
        grid=(z.batch * z.value_heads,),
        in_specs=[
            own,
            (
                keys(z.heads),
                keys(z.heads),
                None if x.p is None else keys(z.p_heads),
                *(gate,) * 4,
            ),
            spec((None, 1), lambda b, h: (b, 0)),
        ],
        out_specs=(Plan(of_head(2, z.key_dim), of_head(2, slots), of_head(6), of_head(2)), own),
        out_shape=(
            Plan(shape(2, z.key_dim), shape(2, slots), shape(6), shape(2, dtype=jnp.int32)),
            shapes_of(appended),
        ),
        aliases={i: 4 + i for i in range(3)},
        warps=_PLAN_WARPS,
        stages=1,
        interpret=options.interpret,
    )
    return result


class _Walked(NamedTuple):
    """What the steps since make of the states, and of each other's writes.

    Attributes:
      a: of S0 in S.
      b: of -M0 in S.
      m: of M0 in M.
      w: of the write of each slot in -M, `[2L]`; zero for a free slot.
      g: of the write of each slot in S, `[2L]`.
    """

    a: jax.Array
    b: jax.Array
    m: jax.Array
    w: jax.Array
    g: jax.Array

    def after(self, alpha: jax.Array, mu: jax.Array, beta: jax.Array) -> "_Walked":
        """One step more, its own write apart."""
        m, w = mu * self.m, mu * self.w
        return _Walked(alpha * self.a, alpha * self.b + beta * m, m, w, alpha * self.g + beta * w)


def _walk(gates: Leaf, first: jax.Array, kept: jax.Array) -> _Walked:
    """The coefficients of the steps that are kept, by one step after another."""
    slots = gates.shape[0]
    slot_of = lax.broadcasted_iota("int32", (slots,), 0)
    none = jnp.zeros((slots,), jnp.float32)
    c = _Walked(jnp.float32(1.0), jnp.float32(0.0), jnp.float32(1.0), none, none)
    for i in range(slots - 1):  # no loop: all gates are on their way at once
        slot, there = lax.rem(first + i, slots), i < kept
        alpha, mu, beta, eta = (
            jnp.where(there, gates[slot, n], nothing)
            for n, nothing in enumerate((1.0, 1.0, 0.0, 0.0))
        )
        after = c.after(alpha, mu, beta)
        own = jnp.where(slot_of == slot, eta, 0.0)
        c = after._replace(w=after.w + own, g=after.g + beta * own)
    return c


def _plan(ring, tokens, active, out, *, normalize, value_heads, share):
    plan, appended = out
    first, kept = ring.counts[0], ring.counts[1]
    slots = ring.keys.shape[0]
    keys = ring.keys[...].astype(jnp.float32)
    q_ref, k_ref, p_ref, log_alpha, log_mu, beta_ref, eta_ref = tokens
    q, own_key = normalized(q_ref[0, :], normalize), k_ref[0, :]
    raw = own_key.astype(jnp.float32)
    inverse = jnp.float32(1.0)
    if normalize:
        short = SHORTER * raw
        inverse = SHORTER * inverse_norm(jnp.sum(short * short), SHORTER**2 * 1e-6)
    alpha, mu = jnp.exp(log_alpha[0]), jnp.exp(log_mu[0])
    beta, eta = beta_ref[0], eta_ref[0] * inverse
    p = alpha * inverse * raw if p_ref is None else p_ref[0, :].astype(jnp.float32)
    before = _walk(ring.gates, first, kept)
    after = before.after(alpha, mu, beta)
    plan.keys[0, :], plan.keys[1, :] = p, q
    plan.weights[0, :] = times(before.g, jnp.sum(keys * p[None, :], axis=1))
    plan.weights[1, :] = times(after.g, jnp.sum(keys * q[None, :], axis=1))
    own = beta * eta * jnp.sum(raw * q)
    dead = jnp.where((alpha == 0) & (mu == 0), 1.0, 0.0)
    for n, factor in enumerate((before.a, before.b, after.a, after.b, own, dead)):
        plan.factors[n] = factor
    slot, full = lax.rem(first + kept, slots), kept == slots - 1
    plan.slots[0], plan.slots[1] = slot, jnp.where(full, first, -1)
    for n, gate in enumerate((alpha, mu, beta, eta)):
        appended.gates[slot, n] = gate
    length = slots // 2
    appended.counts[0] = jnp.where(full, lax.rem(first + length, slots), first)
    appended.counts[1] = jnp.where(full, kept - length, kept) + active[0]

    @pl.when(lax.rem(lax.rem(pl.program_id(0), value_heads), share) == 0)
    def _() -> None:
        appended.keys[slot, :] = own_key


def _replay(in_place, values, plan, keys, gates, out, *, options):
    (memory, written), (o_ref, (memory_out, written_out)) = in_place, out
    s, m = memory.s[...].astype(jnp.float32), memory.m[...].astype(jnp.float32)
    p, q, v_news = plan.keys[0, :], plan.keys[1, :], written[...]
    seen_of, out_of = plan.weights[0, :], plan.weights[1, :]
    a, b, a_after, b_after, own, dead = (plan.factors[n] for n in range(6))
    v = values[0, :].astype(jnp.float32)

    def total(y, weights, of_s, of_m):
        products = [jnp.sum(tile * y[:, None], axis=0) for tile in (s, m)]
        if memory.scale is not None:
            products = [memory.scale[row, :] * x for row, x in enumerate(products)]
        of_states = times(of_s, products[0]) - times(of_m, products[1])
        return of_states + jnp.sum(times(weights[:, None], v_news), axis=0)

    # what was there before this step writes, all of it: the states are done with
    seen, o = total(p, seen_of, a, b), total(q, out_of, a_after, b_after)
    v_new = v - clean(seen, dead > 0)
    o_ref[0, :] = (options.scale * (o + own * v_new)).astype(o_ref.dtype)
    written_out[plan.slots[0], :] = v_new
    first = plan.slots[1]

    @pl.when(first >= 0)
    def _() -> None:
        # loaded again: registers for both until here would leave room for fewer programs
        store_states(memory_out, *_applied(keys, written, gates, first, *load_states(memory)))


def _applied(keys, written, gates, first, s, m):
    """The states after the oldest half of the ring."""
    slots = keys.shape[0]

    def step(i: jax.Array, states: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        s, m = states
        slot = lax.rem(first + i, slots)
        alpha, mu, beta, eta = (gates[slot, n] for n in range(4))
        k, v_new = keys[slot, :].astype(jnp.float32), written[slot, :]
        m = times(mu, m) - (eta * k)[:, None] * v_new[None, :]
        return times(alpha, s) - beta * m, m

    return lax.fori_loop(0, slots // 2, step, (s, m))
