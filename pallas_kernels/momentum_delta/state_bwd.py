"""State pass, backward (`bwd_dhu`): gradients of the states from the last chunk to the first.

Computes, chunk by chunk backwards (docs/algorithm.md, section 5; gradients are with respect to
N = -M):

    dV' = attention^T dO + (eta * gamma[C]) * (K dS) + (eta * carry[C]) * (K dN)
    dV  = (I + L)^-T dV'
    dS0 = DECAY dS               + scale (decay * Q)^T dO - (decay_before * P)^T dV
    dN0 = LEAD dS + MOMENTUM dN  + scale (lead * Q)^T dO  - (lead_before * P)^T dV

    inputs   q, keys, d_o, the local term of dV' (dv_local_bwd.py), inverse, factors; gradients of
             the final memory [B, HV, K, V] float32
    outputs  d_v [B, T, HV, V]; d_states: dS and dN of the states leaving every chunk
             [B, HV, NT, K, V], both in the storage dtype with block scales; gradients of the
             initial memory, float32
    grid     (blocks of V, B, HV): a block of V of one head a program, over all chunks

Why so: the mirror of `state_fwd`; see there. Rows and the local term are loaded a chunk ahead.
`d_v` takes the memory of the local term: a tile is read before it is written.

Constraints: as `state_fwd`.

Run it alone: `python -m benchmarks stages --stages state_bwd`.
"""

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
    bound_of,
    scale_states,
    store_states,
    store_values,
    unscale_states,
)
from pallas_kernels.momentum_delta.block_specs import WalkSpecs
from pallas_kernels.momentum_delta.dv_local_bwd import LocalGradients
from pallas_kernels.momentum_delta.isolation import clean, finite, keeps_nothing, times, unless
from pallas_kernels.momentum_delta.launches import launches
from pallas_kernels.momentum_delta.register_layout import (
    RegisterLayout,
    join,
    split,
)
from pallas_kernels.momentum_delta.rows import STATE_ROWS, STATE_SCALARS, ChunkScalar, FactorRow
from pallas_kernels.momentum_delta.types import (
    CHUNK,
    IntraChunk,
    Memory,
    Options,
    States,
    Tokens,
    Values,
)


class StateGradients(NamedTuple):
    """What the state pass backward gives.

    Attributes:
      d_v: gradient of v, in the storage dtype.
      d_states: gradients of the states leaving each chunk, in the storage dtype.
      d_memory: gradient of the initial memory, float32.
    """

    d_v: Values
    d_states: States
    d_memory: Memory


def state_bwd(
    x: Tokens,
    intra: IntraChunk,
    d_o: jax.Array,
    local: LocalGradients,
    d_final: Memory,
    options: Options,
    *,
    in_place: bool = True,
) -> StateGradients:
    """The state pass from the last chunk to the first.

    In one launch, or in several that take the walks in halves and each add to the results of those
    before. `d_v` takes the memory of `local.d_v_new`, if `in_place`: a tile is read before it is
    written.
    """
    z = x.sizes
    block, storage = options.tiles.state_bwd_block_v, options.numerics.storage
    done: Any = None
    d_v_new, walk_keys = local.d_v_new.data, intra.walk_keys(x)
    for launch in launches(WalkSpecs(z, block).walks, options.tiles.state_bwd_resident):
        specs = WalkSpecs(z, block, launch)
        keys, values, memory = specs.keys(z.heads), specs.values(), specs.memory()
        p = None if x.p is None else specs.keys(z.p_heads)
        scales = local.d_o_scale, local.d_v_new.scale
        tokens = (x.q, *walk_keys, d_o, scales, d_v_new)
        d_v = Values(values, specs.scales(storage))
        shapes = (
            Values(z.per_head(z.value_dim, storage), z.scales(block, storage)),
            z.states(block, storage),
        )
        # what earlier launches wrote stays where it is: places of operands, to those of results
        after, results = len(jax.tree.leaves(tokens)), len(jax.tree.leaves(shapes))
        aliases = {after - 1: 0} if in_place else {}
        if launch is not None:
            aliases |= {after: results, after + 1: results + 1}
        written = written_specs = None
        if done is not None:
            again = done.d_v._replace(data=None) if in_place else done.d_v
            written = again, done.d_states
            written_specs = d_v._replace(data=None) if in_place else d_v, specs.states(storage)
            aliases |= {after + 2 + i: i + in_place for i in range(results - in_place)}
        done = kernel_call(
            partial(
                _state_bwd,
                specs=specs,
                warps=options.tiles.state_bwd_warps,
                storage=storage,
                precision=options.numerics.products,
            ),
            tokens,
            d_final,
            written,
            (intra.inverse, intra.factors),
            name="mdn_state_bwd",
            grid=specs.grid,
            in_specs=[
                (keys, keys, p, values, tuple(map(specs.scales_of, scales)), values),
                memory,
                written_specs,
                (specs.matrix(), specs.factors()),
            ],
            out_specs=StateGradients(d_v, specs.states(storage), memory),
            out_shape=StateGradients(*shapes, z.memory),
            aliases=aliases,
            warps=options.tiles.state_bwd_warps,
            stages=options.tiles.state_bwd_stages,
            interpret=options.interpret,
        )
        d_v_new, d_final = (done.d_v.data if in_place else d_v_new), done.d_memory
    result: StateGradients = done
    return result


def _state_bwd(tokens, d_final, _, intra, out, *, specs, warps, storage, precision):
    key_dim, block = d_final.s.shape
    layout = RegisterLayout(warps, block)
    stretch = specs.stretch(back=True)
    d_states = layout.load(d_final.s, key_dim), -layout.load(d_final.m, key_dim)
    d_s, d_n = walk_back(tokens, intra, out, d_states, stretch, layout, storage, precision)
    layout.store(d_s, out.d_memory.s)
    layout.store(-d_n, out.d_memory.m)


def walk_back(
    tokens: Any,
    intra: tuple[Any, Any],
    out: Any,
    d_states: tuple[jax.Array, jax.Array],
    stretch: tuple[int | jax.Array, int | jax.Array],
    layout: RegisterLayout,
    storage: jnp.dtype,
    precision: Precision | None,
    *,
    stores: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A program's walk back over chunks, inside a kernel.

    Args:
      tokens: references to q, keys, d_o, scales and the local term of the gradient of v_new.
      intra: references to inverse and factors.
      out: references, `d_v` and `d_states` among them; None: nothing is stored.
      d_states: gradients of memory and negated momentum behind the last chunk, `[K, block]`.
      stretch: first and end of the chunks.
      layout: of the tiles.
      storage: dtype of what is stored.
      precision: of products of float32.
      stores: a scalar; if False nothing is stored. None: it is True.

    Returns:
      The gradients of memory and negated momentum before the first chunk.
    """
    q_ref, k_ref, p_ref, do_ref, (output_scale, local_scale), local_ref = tokens
    inverse_ref, factor_ref = intra
    first, end = stretch

    def ahead(c: jax.Array) -> tuple[jax.Array, ...]:
        return (
            layout.load(local_ref, CHUNK, first=c * CHUNK),
            *(factor_ref[c, row, :] for row in STATE_ROWS),
            *(factor_ref[c, FactorRow.SCALARS, i] for i in STATE_SCALARS),
        )

    def step(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        # both gradients are one [K, 2 block] float32; rows and d_local were loaded a step ahead
        d_both, leaving, d_local, *rows, decay, lead, momentum = carry
        read_s, read_n, write_s, write_n, query_s, query_n = (row[:, None] for row in rows)
        starts = keeps_nothing(decay, lead, momentum)
        c = end - 1 - i
        start = c * CHUNK
        following = ahead(jnp.maximum(c - 1, 0))
        d_s, d_n = split(d_both)
        scales = None if leaving is None else leaving.scales
        if out is not None:
            store_states(out.d_states, c, d_s, d_n, scales, layout, stores)
        d_both = unless(starts, d_both, finite)
        d_s, d_n = split(d_both)
        steps = pl.ds(start, CHUNK)
        k, q = k_ref[steps, :], q_ref[steps, :]
        p = k if p_ref is None else p_ref[steps, :]
        d_o = layout.load(do_ref, CHUNK, first=start).astype(jnp.float32)
        inverse_scale = None
        if scales is not None:
            inverse_scale = factor_ref[c, FactorRow.SCALARS, ChunkScalar.INVERSE_SCALE]
            scale_s, scale_n = (clean(scale.size, starts) for scale in scales)
            write_s, write_n = write_s * scale_s, write_n * scale_n

        by_s, by_n = split(dot(k, d_both.astype(storage), precision))
        # what is loaded as values keeps the sum in their layout, of two numbers of a row a thread
        d_v_new = d_local.astype(jnp.float32)
        if leaving is not None:
            d_v_new *= local_scale[c]
        d_v_new = d_v_new + write_s * by_s + write_n * by_n
        d_v, quantized = apply_inverse(d_v_new, inverse_ref[c].T, inverse_scale, precision)
        entering = None
        if out is not None:
            store_values(out.d_v, c, start, d_v, quantized, layout, stores)
        if leaving is not None and quantized is not None:
            outputs = bound_of(output_scale[c])
            reach_s, reach_n = (
                factor_ref[c, FactorRow.SCALARS, by_query] * outputs
                + factor_ref[c, FactorRow.SCALARS, by_read] * quantized.max_magnitude
                for by_query, by_read in (
                    (ChunkScalar.REACH_QUERY_S, ChunkScalar.REACH_READ_S),
                    (ChunkScalar.REACH_QUERY_N, ChunkScalar.REACH_READ_N),
                )
            )
            entering = Bounds(
                times(abs(decay), leaving.s) + reach_s,
                times(abs(lead), leaving.s) + times(abs(momentum), leaving.n) + reach_n,
            )
            to_s, to_n = (scale.inverse for scale in entering.scales)
            # in this order nothing overflows
            decay, lead, momentum = (
                times(decay, scale_s) * to_s,
                times(lead, scale_s) * to_n,
                times(momentum, scale_n) * to_n,
            )
            read_s, read_n = read_s * to_s, read_n * to_n
            query_s, query_n = query_s * to_s, query_n * to_n

        d_both = join(decay * d_s, lead * d_s + momentum * d_n)
        # both products accumulate onto what is kept
        by_query = join(query_s * d_o, query_n * d_o).astype(
            storage if leaving is None else q.dtype
        )
        d_both += dot(q.T, by_query, precision)
        by_read = join(-read_s * d_v, -read_n * d_v).astype(storage)
        d_both += dot(p.T, by_read, precision)
        return d_both, entering, *following

    d_s, d_n, bounds = scale_states(*d_states, storage)
    carry = join(d_s, d_n), bounds, *ahead(jnp.int32(end - 1))
    d_both, bounds, *_ = lax.fori_loop(0, end - first, step, carry)
    return unscale_states(*split(d_both), bounds)
