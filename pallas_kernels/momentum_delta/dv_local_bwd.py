"""Gradient of v_new from its own chunk's outputs (`bwd_dv_local`).

Computes the first term of dV' (docs/algorithm.md, section 5):

    d_v_new = attention^T dO

    inputs   attention [B, HV, NT, C, C], d_o [B, T, HV, V]
    outputs  d_v_new [B, T, HV, V] in the storage dtype with block scales; d_o_scale, the block
             scale that float16 needs for d_o [B, HV, NT, blocks of V]
    grid     flat, blocks of V x HV x NT x B: a block of V of one chunk a program

Why so: it needs no state, and keeps a matrix a chunk out of `state_bwd`, which is short of shared
memory.

Constraints: takes the blocks and warps of `output_fwd`.

Run it alone: `python -m benchmarks stages --stages dv_local_bwd`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.lowering import dot, kernel_call
from pallas_kernels.momentum_delta.block_scaling import max_magnitude, quantize, scale_for
from pallas_kernels.momentum_delta.block_specs import ChunkSpecs
from pallas_kernels.momentum_delta.types import IntraChunk, Leaf, Options, Tokens, Values


class LocalGradients(NamedTuple):
    """What a chunk's outputs give.

    Attributes:
      d_v_new: gradient of v_new from them alone, in the storage dtype.
      d_o_scale: block scale that float16 needs for d_o, `[B, HV, NT, blocks of V]` float32; None
        where nothing is in float16.
    """

    d_v_new: Values
    d_o_scale: Leaf | None


def dv_local_bwd(x: Tokens, intra: IntraChunk, d_o: jax.Array, options: Options) -> LocalGradients:
    """The gradient of v_new from its own chunk's outputs, `attention^T dO`."""
    z = x.sizes
    block = options.tiles.output_fwd_block_v
    specs = ChunkSpecs(z, z.value_dim // block)
    values = specs.tokens(block, z.value_heads, blocked=True)
    storage = options.numerics.storage
    scale = z.scales(block, storage)
    scale_spec = None if scale is None else specs.scale()
    return kernel_call(
        partial(_dv_local_bwd, precision=options.numerics.products),
        intra.attention,
        d_o,
        name="mdn_dv_local_bwd",
        grid=specs.grid,
        in_specs=[specs.matrix(), values],
        out_specs=LocalGradients(Values(values, scale_spec), scale_spec),
        out_shape=LocalGradients(Values(z.per_head(z.value_dim, storage), scale), scale),
        warps=options.tiles.output_fwd_warps,
        stages=1,
        interpret=options.interpret,
    )


def _dv_local_bwd(attention, d_o_ref, out, *, precision):
    d_o = d_o_ref[...]
    d_v_new = dot(attention[...].T, d_o, precision)
    if out.d_o_scale is None:
        out.d_v_new.data[...] = d_v_new.astype(out.d_v_new.data.dtype)
    else:
        out.d_o_scale[0] = scale_for(max_magnitude(d_o.astype(jnp.float32))).size
        out.d_v_new.data[...], out.d_v_new.scale[0], _ = quantize(d_v_new)
