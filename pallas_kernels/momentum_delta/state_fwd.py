"""State pass, forward: takes the states from chunk to chunk (`fwd_h`), sequential over time.

Computes, chunk by chunk (docs/algorithm.md, section 2):

    V'  = (I + L)^-1 (V - decay_before * (P S0) - lead_before * (P N0))
    S_C = DECAY S0 + LEAD N0 + K^T ((eta * gamma[C]) * V')
    N_C = MOMENTUM N0        + K^T ((eta * carry[C]) * V')

    inputs   keys (float16 or as given), v [B, T, HV, V], inverse, factors; the entering memory
             [B, HV, K, V] float32, or None for zeros
    outputs  v_new V' [B, T, HV, V]; states: S0 and N0 of every chunk [B, HV, NT, K, V], both in the
             storage dtype with block scales; the final memory, float32
    grid     (blocks of V, B, HV): a block of V of one head a program, over all chunks

Why so: columns of V are independent in this recurrence, so a program holds `[K, block]` of S and of
N in registers, side by side as one `[K, 2 block]` operand. What needs no state is elsewhere: only
these lines wait for the chunk before. Where the walks fill the device badly they are cut into
halves, in several launches (launches.py); each continues the results of the one before.

Constraints: block_v is 16 or a multiple of 32 (register_layout.py). Results that are not finite are
walked once more with care (isolation.py), so that no document sees another's: by a kernel of its
own, `mdn_state_fwd_again`, for the registers of the first.

Run it alone: `python -m benchmarks stages --stages state_fwd`.
"""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import Precision, dot, kernel_call
from pallas_kernels.momentum_delta.block_scaling import (
    Bounds,
    apply_inverse,
    scale_states,
    store_states,
    store_values,
    unscale_states,
)
from pallas_kernels.momentum_delta.block_specs import WalkSpecs
from pallas_kernels.momentum_delta.isolation import clean, keeps_nothing
from pallas_kernels.momentum_delta.isolation import times as times_exactly
from pallas_kernels.momentum_delta.launches import Launch, launches
from pallas_kernels.momentum_delta.register_layout import (
    RegisterLayout,
    join,
    split,
)
from pallas_kernels.momentum_delta.rows import STATE_SCALARS, ChunkScalar, FactorRow
from pallas_kernels.momentum_delta.types import (
    CHUNK,
    IntraChunk,
    Memory,
    Options,
    States,
    Tokens,
    Values,
    WalkKeys,
)


class StatePass(NamedTuple):
    """What the state pass gives.

    Attributes:
      v_new: V' of every step, in the storage dtype.
      states: the states entering each chunk, in the storage dtype.
      final: the memory after the last step, float32.
    """

    v_new: Values
    states: States
    final: Memory


def state_fwd(x: Tokens, intra: IntraChunk, memory: Memory | None, options: Options) -> StatePass:
    """The state pass; no memory means zeros.

    In one launch, or in several that take the walks in halves and each add to the results of those
    before; then a launch that walks again, with care, where the final memory is not finite.
    """
    walks = WalkSpecs(x.sizes, options.tiles.state_fwd_block_v).walks
    done = None
    for launch in launches(walks, options.tiles.state_fwd_resident):
        done = _walks(x, intra, memory, done, options, launch)
    return walk_again(x, intra, memory, done, options)


def walk_again(
    x: Tokens,
    intra: IntraChunk,
    memory: Memory | None,
    done: Any,
    options: Options,
    spoiled: jax.Array | None = None,
) -> StatePass:
    """The launch that walks again, with care, where the final memory is not finite.

    Args:
      x: tokens and gates.
      intra: of the chunks.
      memory: entering; None means zeros.
      done: the state pass, whose memory is taken.
      options: of the call.
      spoiled: of rows in pieces: zero, or nan where a piece's last states are not finite,
        `[B, HV, pieces, blocks of V]`.
    """
    return _walks(x, intra, memory, done, options, None, carefully=True, spoiled=spoiled)


def _walks(
    x: Tokens,
    intra: IntraChunk,
    memory: Memory | None,
    done: StatePass | None,
    options: Options,
    launch: Launch | None,
    *,
    carefully: bool = False,
    spoiled: jax.Array | None = None,
) -> StatePass:
    """One launch; what earlier ones `done` stays where it is."""
    z = x.sizes
    block, storage = options.tiles.state_fwd_block_v, options.numerics.storage
    specs = WalkSpecs(z, block, launch)
    p = None if x.p is None else specs.keys(z.p_heads)
    out_specs = StatePass(
        Values(specs.values(), specs.scales(storage)), specs.states(storage), specs.memory()
    )
    out_shape = StatePass(
        Values(z.per_head(z.value_dim, storage), z.scales(block, storage)),
        z.states(block, storage),
        z.memory,
    )
    tokens = (intra.walk_keys(x), x.v, intra.inverse, intra.factors)
    entering: Memory | None = memory
    written: Any = done
    written_specs: Any = None if done is None else out_specs
    if done is not None and not carefully:  # halves continue the memory that others have left
        entering, written, written_specs = done.final, done[:2], out_specs[:2]
    # what was written stays where it is: places of operands, to those of results
    at, results = len(jax.tree.leaves(tokens)), len(jax.tree.leaves(out_shape))
    aliases = {}
    if launch is not None and entering is not None:
        aliases = {at: results - 2, at + 1: results - 1}
    at += len(jax.tree.leaves(entering))
    aliases |= {at + i: i for i in range(len(jax.tree.leaves(written)))}
    body = partial(
        _walk_again if carefully else _state_fwd,
        specs=specs,
        warps=options.tiles.state_fwd_warps,
        precision=options.numerics.products,
    )
    result: StatePass = kernel_call(
        body if carefully else partial(body, from_zeros=memory is None),
        tokens,
        entering,
        written if spoiled is None else (written, spoiled),
        name="mdn_state_fwd_again" if carefully else "mdn_state_fwd",
        grid=specs.grid,
        in_specs=[
            (WalkKeys(specs.keys(z.heads), p), specs.values(), specs.matrix(), specs.factors()),
            None if entering is None else out_specs.final,
            written_specs if spoiled is None else (written_specs, specs.of_pieces(spoiled)),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        aliases=aliases,
        warps=options.tiles.state_fwd_warps,
        stages=1 if carefully else options.tiles.state_fwd_stages,
        interpret=options.interpret,
    )
    return result


def _walk_again(tokens, memory, done, out, *, warps, **walk):
    """What is not finite stays so to the end of its row, by then in other documents as well."""
    layout = RegisterLayout(warps, out.final.s.shape[1])
    key_dim = out.final.s.shape[0]
    again = partial(_state_fwd, tokens, memory, None, out, warps=warps, carefully=True, **walk)
    if isinstance(done, StatePass):
        found = layout.load(done.final.s, key_dim) * 0.0
        found = jnp.sum(found + layout.load(done.final.m, key_dim) * 0.0)
    else:  # of a row in pieces each has its say
        _, spoiled = done
        found = sum((spoiled[i] for i in range(1, spoiled.shape[0])), start=spoiled[0])
    pl.when(found != 0.0)(again)


def _state_fwd(
    tokens, memory, _, out, *, specs, warps, precision, from_zeros=False, carefully=False
):
    key_dim, block = out.final.s.shape
    layout = RegisterLayout(warps, block)
    first, end = specs.stretch()
    states = _entering(memory, layout, (key_dim, block), first, from_zeros=from_zeros)
    s, n = walk(
        tokens,
        out,
        states,
        (first, end),
        layout,
        precision,
        storage=out.v_new.data.dtype,
        carefully=carefully,
    )
    layout.store(s, out.final.s)
    layout.store(-n, out.final.m)


def walk(
    tokens: Any,
    out: Any,
    states: tuple[jax.Array, jax.Array],
    stretch: tuple[int | jax.Array, int | jax.Array],
    layout: RegisterLayout,
    precision: Precision | None,
    *,
    storage: jnp.dtype,
    carefully: bool = False,
    has_values: jax.Array | None = None,
    stores: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A program's walk over chunks, inside a kernel.

    Args:
      tokens: references to keys, values, inverse and factors.
      out: references, `v_new` and `states` among them; None: nothing is stored.
      states: memory and negated momentum before the first chunk, `[K, block]` float32.
      stretch: first and end of the chunks.
      layout: of the tiles.
      precision: of products of float32.
      storage: dtype of what is stored.
      carefully: with selects, so that nothing that is not finite is in two documents.
      has_values: a scalar; if False values are zero. None: it is True.
      stores: a scalar; if False nothing is stored. None: it is True.

    Returns:
      Memory and negated momentum behind the last chunk.
    """
    (k_ref, p_ref), v_ref, inverse_ref, factor_ref = tokens

    def step(
        c: jax.Array, carry: tuple[jax.Array, Bounds | None]
    ) -> tuple[jax.Array, Bounds | None]:
        # both states are one [K, 2 block] float32, operands of one product and results of one
        both, entering = carry
        start = c * CHUNK
        # the order is the measured one: with the states stored after a product a step takes longer
        decay, lead, momentum = (factor_ref[c, FactorRow.SCALARS, i] for i in STATE_SCALARS)
        v = layout.load(v_ref, CHUNK, first=start, where=has_values).astype(jnp.float32)
        s, n = split(both)
        scales = None if entering is None else entering.scales
        if out is not None:
            store_states(out.states, c, s, n, scales, layout, stores)
        k = k_ref[pl.ds(start, CHUNK), :]
        p = k if p_ref is None else p_ref[pl.ds(start, CHUNK), :]

        def factor(row: int, by: jax.Array | None = None) -> jax.Array:
            factors = factor_ref[c, row, :]
            return (factors if by is None else factors * by)[:, None]

        starts = keeps_nothing(decay, lead, momentum) if carefully else None
        times: Callable[[Any, Any], Any] = times_exactly if carefully else operator.mul
        by_s = by_n = to_s = to_n = inverse_scale = None
        if scales is not None:
            by_s, by_n = (scale.size for scale in scales)
            if starts is not None:
                by_s, by_n = clean(by_s, starts), clean(by_n, starts)
            inverse_scale = factor_ref[c, FactorRow.SCALARS, ChunkScalar.INVERSE_SCALE]
        seen = dot(p, both.astype(storage), precision)
        if starts is not None:
            seen = clean(seen, starts)
        seen_s, seen_n = split(seen)
        residual = v - factor(FactorRow.READ_S, by_s) * seen_s
        residual -= factor(FactorRow.READ_N, by_n) * seen_n
        v_new, quantized = apply_inverse(residual, inverse_ref[c], inverse_scale, precision)
        leaving = None
        if out is not None:
            store_values(out.v_new, c, start, v_new, quantized, layout, stores)
        if entering is not None and quantized is not None:
            reach_s, reach_n = (
                factor_ref[c, FactorRow.SCALARS, i] * quantized.max_magnitude
                for i in (ChunkScalar.REACH_WRITE_S, ChunkScalar.REACH_WRITE_N)
            )
            leaving = Bounds(
                times(abs(decay), entering.s) + times(abs(lead), entering.n) + reach_s,
                times(abs(momentum), entering.n) + reach_n,
            )
            to_s, to_n = (scale.inverse for scale in leaving.scales)
            # in this order nothing overflows
            decay, lead, momentum = (
                times(decay, by_s) * to_s,
                times(lead, by_n) * to_s,
                times(momentum, by_n) * to_n,
            )
        carried = join(decay * s + lead * n, momentum * n)
        if starts is not None:
            carried = clean(carried, starts)
        writes = join(
            factor(FactorRow.WRITE_S, to_s) * v_new, factor(FactorRow.WRITE_N, to_n) * v_new
        )
        return carried + dot(k.T, writes.astype(storage), precision), leaving

    s, n, bounds = scale_states(*states, storage)
    both, bounds = lax.fori_loop(*stretch, step, (join(s, n), bounds))
    return unscale_states(*split(both), bounds)


def _entering(
    memory: Memory | None,
    layout: RegisterLayout,
    shape: tuple[int, int],
    first: int | jax.Array,
    *,
    from_zeros: bool,
) -> tuple[jax.Array, jax.Array]:
    """Memory and negated momentum before the program's first chunk, float32."""
    if memory is None:
        zeros = jnp.zeros(shape, jnp.float32)
        return zeros, zeros
    s, n = layout.load(memory.s, shape[0]), -layout.load(memory.m, shape[0])
    if from_zeros:  # what is there is of the first halves of walks
        s, n = jnp.where(first == 0, 0.0, s), jnp.where(first == 0, 0.0, n)
    return s, n
