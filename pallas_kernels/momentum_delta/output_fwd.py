"""Outputs, forward (`fwd_o`): from the states and from the chunk's own writes.

Computes (docs/algorithm.md, section 2):

    O = scale * (decay * (Q S0) + lead * (Q N0)) + attention V'

    inputs   q [B, T, H, K], v_new [B, T, HV, V], attention [B, HV, NT, C, C], factors,
             states [B, HV, NT, K, V]
    outputs  o [B, T, HV, V] in v's dtype
    grid     flat, blocks of V x HV x NT x B: a block of V of one chunk a program

Why so: chunks are independent once the states are known. The blocks of a chunk run side by side,
for they read the same q and attention. The rows of factors scale the products, not q: no scaled
copy of q is needed.

Constraints: with float16 states queries become float16, each row first brought near 1 by a power
of two; v_new is brought to q's dtype.

Run it alone: `python -m benchmarks stages --stages output_fwd`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.lowering import dot, kernel_call
from pallas_kernels.momentum_delta.block_scaling import column_scales, power_of_two
from pallas_kernels.momentum_delta.block_specs import ChunkSpecs
from pallas_kernels.momentum_delta.rows import FactorRow
from pallas_kernels.momentum_delta.types import IntraChunk, Options, States, Tokens, Values


def output_fwd(
    x: Tokens, intra: IntraChunk, v_new: Values, states: States, options: Options
) -> jax.Array:
    """Outputs `[B, T, HV, V]`, in v's dtype."""
    z = x.sizes
    block = options.tiles.output_fwd_block_v
    specs = ChunkSpecs(z, z.value_dim // block)
    values = specs.tokens(block, z.value_heads, blocked=True)
    return kernel_call(
        partial(_output_fwd, options=options, block_of=specs.block, value_dim=z.value_dim),
        x.q,
        v_new,
        intra.attention,
        intra.factors,
        states,
        name="mdn_output_fwd",
        grid=specs.grid,
        in_specs=[
            specs.tokens(z.key_dim, z.heads),
            Values(values, specs.scales(v_new.scale)),
            specs.matrix(),
            specs.factors(),
            specs.states(states, z.key_dim, block, cut="v"),
        ],
        out_specs=values,
        out_shape=z.per_head(z.value_dim, x.v.dtype),
        warps=options.tiles.output_fwd_warps,
        stages=1,
        interpret=options.interpret,
    )


def _output_fwd(q, v_new, attention, factors, states, out, *, options, block_of, value_dim):
    precision = options.numerics.products
    queries, written, matrix = q[...], v_new.data[...], attention[...]
    query_s, query_n = (factors[i, :][:, None] for i in (FactorRow.QUERY_S, FactorRow.QUERY_N))
    if states.scale is not None:
        # queries become float16, each about 1 long or with its largest element near 1; v_new what
        # q was
        if options.normalize:
            lengths = (options.scale / factors[FactorRow.NORM_Q, :])[:, None]
        else:
            lengths = jnp.max(jnp.abs(queries.astype(jnp.float32)), axis=1)[:, None]
        power = power_of_two(lengths)
        queries = (queries.astype(jnp.float32) * power.inverse).astype(states.s.dtype)
        query_s, query_n = query_s * power.size, query_n * power.size
        first, count = block_of(pl.program_id(0)) * out.shape[1], out.shape[1]
        of_states = column_scales(states.scale, value_dim, first, count)[None, :]
        v_new_scales = column_scales(v_new.scale, value_dim, first, count)[None, :]
        written = (written.astype(jnp.float32) * v_new_scales).astype(matrix.dtype)
    o = query_s * dot(queries, states.s[...], precision)
    o += query_n * dot(queries, states.n[...], precision)
    if states.scale is not None:
        o *= of_states
    # a state that is not finite has no part in documents that it does not reach
    o = jnp.where((query_s == 0) & (query_n == 0), 0.0, o) + dot(matrix, written, precision)
    out[...] = o.astype(out.dtype)
