"""The state passes of stretches: each device has one of a row, and none knows what enters it.

As rows in pieces (pieces.py), with the other stretches between the two launches:

    forward    ends of all pieces: U from zero, and Phi
               link: [U | Phi] of the pieces up to the end of each
               exchange: those of the stretch for the states X that enter it
               all walks at once, each from U + Phi X of the pieces before it
    backward   starts of all pieces: D, from the stretch's own final states
               link: [D | Phi^T] of the pieces from each to the stretch's end
               exchange: those of the stretch for the gradient G that leaves it
               all walks back at once, each from D + Phi^T G of the pieces behind it

Why so: a stretch's own map is the product of its pieces' maps, so that rows over several devices
cost no pass beside those of rows in pieces. A link has the map as columns beside the states: what
the exchange gives then reaches all pieces in one product.

What is not finite: an end that is not is walked again with care, and the link selects where a
document starts, so that no other stretch sees what its document does not.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.momentum_delta.dv_local_bwd import LocalGradients
from pallas_kernels.momentum_delta.piece_link import link
from pallas_kernels.momentum_delta.piece_walks import ends, from_ends, walks_back
from pallas_kernels.momentum_delta.pieces import (
    before_nothing,
    kept_by,
    memory_of,
    piece_count,
    states_of,
)
from pallas_kernels.momentum_delta.state_bwd import StateGradients
from pallas_kernels.momentum_delta.state_fwd import StatePass, walk_again
from pallas_kernels.momentum_delta.types import (
    CHUNK_FACTORS,
    IntraChunk,
    Leaf,
    Memory,
    Options,
    Tokens,
)


def state_fwd_of_stretch(
    x: Tokens, intra: IntraChunk, memory: Memory, seams: Leaf, options: Options
) -> tuple[StatePass, jax.Array]:
    """The state pass, and `Phi` of the pieces `[B, HV, P, 2 K, 2 K]`; memory is before the row."""
    count = piece_count(x.sizes, options)
    first = ends(x, intra, None, options, count, every=True)
    first = ends(x, intra, None, options, count, every=True, done=first)
    # small, and dear: to compute these again takes two passes and an exchange
    u, phi = (checkpoint_name(y, CHUNK_FACTORS) for y in (first.u, first.phi))
    kept = kept_by(intra.factors, range(count), count)
    phi = jnp.where(kept[..., None, None] != 0, phi, 0)
    u, through = _linked(u, phi, kept, options)
    assert options.exchange is not None
    entering = options.exchange.entering(through[:, :, -1], u[:, :, -1], states_of(memory), seams)
    reaches = jnp.cumprod(kept, axis=2)[:, :, :-1]
    behind = _with(u[:, :, :-1], through[:, :, :-1], entering, reaches)
    before = jnp.concatenate([entering[:, :, None], behind], axis=2)
    before = checkpoint_name(before, CHUNK_FACTORS)
    done = from_ends(x, intra, None, before, options, count)
    whole = StatePass(done.v_new, done.states, memory_of(done.u[:, :, -1]))
    given = memory_of(before[:, :, 0])
    return walk_again(x, intra, given, whole, options, done.spoiled), phi


def state_bwd_of_stretch(
    x: Tokens,
    intra: IntraChunk,
    d_o: jax.Array,
    local: LocalGradients,
    d_final: Memory,
    phi: jax.Array,
    seams: Leaf,
    options: Options,
) -> StateGradients:
    """The state pass from the last chunk to the first, with `phi` of the pass forward.

    The gradient of memory is that of what enters the stretch.
    """
    count = piece_count(x.sizes, options)
    d_behind = states_of(d_final)
    d = before_nothing(d_behind, count)
    starts = walks_back(x, intra, d_o, local, d, None, options, count, every=True)
    kept = kept_by(intra.factors, range(count), count)
    d, through = _linked(starts.d, phi, kept, options, back=True)
    assert options.exchange is not None
    leaving = options.exchange.leaving(jnp.swapaxes(through[:, :, 0], -1, -2), d[:, :, 0], seams)
    reaches = jnp.flip(jnp.cumprod(jnp.flip(kept, 2), axis=2), 2)[:, :, 1:]
    behind = _with(d[:, :, 1:], through[:, :, 1:], leaving, reaches)
    behind = jnp.concatenate([behind, (d_behind + leaving)[:, :, None]], axis=2)
    done = walks_back(x, intra, d_o, local, behind, starts, options, count, every=True)
    return StateGradients(done.d_v, done.d_states, memory_of(done.d[:, :, 0]))


def _linked(
    ends: jax.Array, phi: jax.Array, kept: jax.Array, options: Options, *, back: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Of the pieces up to each: their states from zero, and their map.

    Args:
      ends: states of each piece from zero, `[B, HV, P, 2 K, V]`.
      phi: maps `[B, HV, P, 2 K, 2 K]`.
      kept: whether a piece keeps anything, `[B, HV, P]`.
      options: of the call.
      back: of the pieces from each to the last, and maps transposed.
    """
    columns, count = ends.shape[-1], phi.shape[2]
    order = range(count)[::-1] if back else range(count)
    first = order[0]
    own = jnp.swapaxes(phi[:, :, first], -1, -2) if back else phi[:, :, first]
    maps = jnp.zeros_like(phi).at[:, :, first].set(own)
    both = jnp.concatenate([ends, maps], axis=-1)
    for source, target in pairwise(order):
        both = link(both, phi, (target, source, target), options, kept=kept, back=back)
    return both[..., :columns], both[..., columns:]


def _with(own: jax.Array, through: jax.Array, states: jax.Array, reaches: jax.Array) -> jax.Array:
    """`own + through states` of each piece; `own` where the states do not reach it."""
    product = jnp.matmul(through, states[:, :, None], precision=lax.Precision.HIGHEST)
    return own + jnp.where(reaches[..., None, None] != 0, product, 0)
