"""Decoding that writes the states every L steps: the kernel for one step.

Beside the states of some steps ago, S0 and M0, there is a ring of the steps since: keys, written
values `v' = v - seen` and gates. One step reads both states, derives the coefficients of the steps
since by walking over their gates, and appends itself:

    seen = (a S0 - b M0)^T p + sum_j G_j (k_j . p) v'_j          a, b, G before the step
    o    = scale ((a S0 - b M0)^T q + sum_j G_j (k_j . q) v'_j)  after it, itself included

A step that finds 2L - 1 others applies the oldest L to the states, as decode.py would have done it:

    m = mu m - eta k v'^T       s = alpha s - beta m

    inputs   q, k, v, p, gates [B, 1, ...]; the states, of any kind that decode.py takes; the ring
    outputs  o [B, 1, HV, V] in v's dtype; states and ring, in the place of the entering ones
    grid     flat, blocks of V x HV x B: a block of V of one head a program

Why so: half of what a step of decode.py moves are states written. The ring is small beside them, of
8 steps about a twentieth.

No race: programs of one head share the ring's keys and gates. One of them writes the slot of this
step, which is never one of those that are read: a ring of 2L slots holds at most 2L - 1 steps. The
counts are read alone; the caller computes the next ones (`next_counts`).

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


class Ring(NamedTuple):
    """The steps since the states were written.

    Attributes:
      keys: as they came, not normalised, `[B, H, 2L, K]` in k's dtype.
      v_new: written values, `[B, HV, 2L, V]` float32.
      gates: alpha, mu, beta, and eta times the inverse norm of the key, `[B, HV, 2L, 4]` float32.
    """

    keys: Leaf
    v_new: Leaf
    gates: Leaf


class Replayed(NamedTuple):
    """Results of the kernel.

    Attributes:
      o: outputs `[B, 1, HV, V]` in v's dtype.
      memory: in the place of the entering one.
      ring: the same.
    """

    o: Leaf
    memory: Memory
    ring: Ring


class Walked(NamedTuple):
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


def replay(
    x: Tokens, memory: Memory, ring: Ring, counts: jax.Array, options: DecodeOptions
) -> Replayed:
    """The kernel on padded arrays.

    Args:
      x: tokens and gates, one step, `K` a power of two, `V` a multiple of the block.
      memory: the states that the ring's steps go on from.
      ring: as of the class.
      counts: the oldest step's slot, and how many there are, at most `2L - 1`; `[B, HV, 2]` int32.
      options: static.
    """
    z, block_v = x.sizes, options.tiles.block_v
    blocks, slots = z.value_dim // block_v, ring.keys.shape[2]

    def spec(shape: tuple[int | None, ...], index: Callable[..., tuple]) -> pl.BlockSpec:
        def indices(program: jax.Array) -> tuple:
            rest, block = lax.div(program, blocks), lax.rem(program, blocks)
            return index(lax.div(rest, z.value_heads), lax.rem(rest, z.value_heads), block)

        return pl.BlockSpec(shape, indices)

    def keys(heads: int) -> pl.BlockSpec:
        share = z.value_heads // heads
        return spec((None, 1, None, z.key_dim), lambda b, h, i: (b, 0, lax.div(h, share), 0))

    def of_head(*shape: int) -> pl.BlockSpec:
        return spec((None, None, *shape), lambda b, h, i: (b, h, 0, 0))

    def of_block(rows: int) -> pl.BlockSpec:
        return spec((None, None, rows, block_v), lambda b, h, i: (b, h, 0, i))

    share = z.value_heads // z.heads
    values = spec((None, 1, None, block_v), lambda b, h, i: (b, 0, h, i))
    gate = spec((None, 1, None), lambda b, h, i: (b, 0, h))
    state = of_block(z.key_dim)
    states = Memory(state, state, None if memory.scale is None else of_block(2))
    ring_keys = spec((None, None, slots, z.key_dim), lambda b, h, i: (b, lax.div(h, share), 0, 0))
    rings = Ring(ring_keys, of_block(slots), of_head(slots, 4))
    p = None if x.p is None else keys(z.p_heads)
    entering = len(jax.tree.leaves(x))
    in_place = len(jax.tree.leaves((memory, ring)))
    return kernel_call(
        partial(_replay, options=options, programs=(blocks, z.value_heads, share)),
        x,
        memory,
        ring,
        counts,
        name="mdn_replay",
        # flat, for CUDA allows 65,535 programs along the other dimensions
        grid=(z.batch * z.value_heads * blocks,),
        in_specs=[
            Tokens(keys(z.heads), keys(z.heads), values, p, gate, gate, gate, gate),
            states,
            rings,
            spec((None, None, 2), lambda b, h, i: (b, h, 0)),
        ],
        out_specs=Replayed(values, states, rings),
        out_shape=Replayed(z.per_head(z.value_dim, x.v.dtype), shapes_of(memory), shapes_of(ring)),
        aliases={entering + i: 1 + i for i in range(in_place)},
        warps=options.tiles.warps,
        stages=1,
        interpret=options.interpret,
    )


def walk(ring: Ring, first: jax.Array, count: jax.Array) -> Walked:
    """The coefficients after `count` steps from slot `first`, by one step after another."""
    slots = ring.gates.shape[0]
    slot_of = lax.broadcasted_iota("int32", (slots,), 0)

    def step(i: jax.Array, c: Walked) -> Walked:
        slot = lax.rem(first + i, slots)
        alpha, mu, beta, eta = (ring.gates[slot, n] for n in range(4))
        return advance(c, alpha, mu, beta)._replace(
            w=(w := jnp.where(slot_of == slot, eta, mu * c.w)), g=alpha * c.g + beta * w
        )

    none = jnp.zeros((slots,), jnp.float32)
    one = jnp.float32(1.0)
    return lax.fori_loop(0, count, step, Walked(one, jnp.float32(0.0), one, none, none))


def advance(c: Walked, alpha: jax.Array, mu: jax.Array, beta: jax.Array) -> Walked:
    """One step more, its own write apart."""
    m, w = mu * c.m, mu * c.w
    return Walked(alpha * c.a, alpha * c.b + beta * m, m, w, alpha * c.g + beta * w)


def next_counts(counts: jax.Array, slots: int, active: jax.Array | int) -> jax.Array:
    """The counts after a step; where it is not `active` it leaves no trace."""
    first, kept = counts[..., 0], counts[..., 1]
    length = slots // 2
    folded = jnp.where(kept == slots - 1, length, 0)
    return jnp.stack([(first + folded) % slots, kept - folded + active], axis=-1)


def _replay(x, memory, ring, counts, out, *, options, programs):
    first, kept = counts[0], counts[1]
    slots = ring.keys.shape[0]
    s, m = memory.s[...].astype(jnp.float32), memory.m[...].astype(jnp.float32)
    q, raw = normalized(x.q[0, :], options.normalize), x.k[0, :].astype(jnp.float32)
    inverse = jnp.float32(1.0)
    if options.normalize:
        short = SHORTER * raw
        inverse = SHORTER * inverse_norm(jnp.sum(short * short), SHORTER**2 * 1e-6)
    alpha, mu = jnp.exp(x.log_alpha[0]), jnp.exp(x.log_mu[0])
    beta, eta = x.beta[0], x.eta[0] * inverse
    p = alpha * inverse * raw if x.p is None else x.p[0, :].astype(jnp.float32)

    before = walk(ring, first, kept)
    keys, written = ring.keys[...].astype(jnp.float32), ring.v_new[...]
    after = advance(before, alpha, mu, beta)

    # all products of what was there before this step writes: the states are done with
    read, query = (_products(memory, s, m, y) for y in (p, q))
    overlap, scores = (jnp.sum(keys * y[None, :], axis=1) for y in (p, q))  # [2L]

    def total(c: Walked, products: tuple[jax.Array, jax.Array], of_keys: jax.Array) -> jax.Array:
        weights = times(c.g, of_keys)[:, None]
        of_states = times(c.a, products[0]) - times(c.b, products[1])
        return of_states + jnp.sum(times(weights, written), axis=0)

    seen = clean(total(before, read, overlap), (alpha == 0) & (mu == 0))
    v_new = x.v[0, :].astype(jnp.float32) - seen
    o = total(after, query, scores) + beta * eta * jnp.sum(raw * q) * v_new
    out.o[0, :] = (options.scale * o).astype(out.o.dtype)
    _append(out.ring, lax.rem(first + kept, slots), x.k, v_new, (alpha, mu, beta, eta), programs)

    @pl.when(kept == slots - 1)
    def _() -> None:
        # loaded again: registers for both until here would leave room for fewer programs
        store_states(out.memory, *_applied(ring, first, *load_states(memory)))


def _products(memory, s, m, y):
    """`S^T y` and `M^T y`, `[block]`, of tiles without their scales."""
    products = (jnp.sum(tile * y[:, None], axis=0) for tile in (s, m))
    if memory.scale is None:
        return tuple(products)
    return tuple(memory.scale[row, :] * x for row, x in enumerate(products))


def _append(ring, slot, k, v_new, gates, programs):
    blocks, value_heads, share = programs
    program = pl.program_id(0)
    block, head = lax.rem(program, blocks), lax.rem(lax.div(program, blocks), value_heads)
    ring.v_new[slot, :] = v_new

    @pl.when(block == 0)
    def _() -> None:
        for n, gate in enumerate(gates):
            ring.gates[slot, n] = gate

    @pl.when((block == 0) & (lax.rem(head, share) == 0))
    def _() -> None:
        ring.keys[slot, :] = k[0, :]


def _applied(ring, first, s, m):
    """The states after the oldest half of the ring."""
    slots = ring.keys.shape[0]

    def step(i: jax.Array, states: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        s, m = states
        slot = lax.rem(first + i, slots)
        alpha, mu, beta, eta = (ring.gates[slot, n] for n in range(4))
        k, v_new = ring.keys[slot, :].astype(jnp.float32), ring.v_new[slot, :]
        m = times(mu, m) - (eta * k)[:, None] * v_new[None, :]
        return times(alpha, s) - beta * m, m

    return lax.fori_loop(0, slots // 2, step, (s, m))
