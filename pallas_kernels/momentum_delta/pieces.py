"""The state passes of rows in pieces: all pieces of T beside each other, exactly.

Over a piece the states `X = [S; N]` `[2 K, V]` become `Phi X + U`, with the same `Phi` `[2 K, 2 K]`
for all columns: `Phi` is the walk from the identity without values, `U` the walk from zero. So

    forward    ends of the pieces but the last: U, and Phi of those behind the first
               link: X_(j+1) = Phi_j X_j + U_j
               the walks of the pieces but the first, each from its X
    backward   starts of the pieces but the first: D, from no gradient behind the piece
               link: G_(j-1) = D_j + Phi_j^T G_j, G_j the gradient of the states behind piece j
               the walks back of the pieces but the last, each from its G

Why so: few heads leave most of the device idle, and only the state passes are serial. What the
first launch walks of the row's first piece (backward: of its last) is right already and is stored;
of the others nothing is but their ends. docs/notebook/2026-11-pieces.md has what it costs.

What is not finite: forward it reaches the end of its piece, and the row's end through every link,
so that the row is walked once more with care, as a whole. Backward a walk keeps it in its document,
and the link selects where a document starts within a piece.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.momentum_delta.block_specs import first_chunk
from pallas_kernels.momentum_delta.dv_local_bwd import LocalGradients
from pallas_kernels.momentum_delta.piece_link import link
from pallas_kernels.momentum_delta.piece_walks import ends, from_ends, walks_back
from pallas_kernels.momentum_delta.rows import STATE_SCALARS, FactorRow
from pallas_kernels.momentum_delta.state_bwd import StateGradients, state_bwd
from pallas_kernels.momentum_delta.state_fwd import StatePass, state_fwd, walk_again
from pallas_kernels.momentum_delta.types import IntraChunk, Memory, Options, Sizes, Tokens


def piece_count(z: Sizes, options: Options) -> int:
    """Pieces of a row, each of a chunk at least."""
    return min(options.tiles.pieces, z.chunks)


def state_fwd_in_pieces(
    x: Tokens, intra: IntraChunk, memory: Memory | None, options: Options
) -> tuple[StatePass, jax.Array | None]:
    """The state pass, and `Phi` of the pieces between the first and the last.

    One piece is `state_fwd` itself; fewer than three have no piece between.
    """
    count = piece_count(x.sizes, options)
    if count == 1:
        return state_fwd(x, intra, memory, options), None
    first = ends(x, intra, memory, options, count)
    u = first.u
    for j in range(1, count - 1):
        u = link(u, first.phi, (j, j - 1, j - 1), options)
    done = from_ends(x, intra, (first.v_new, first.states), u, options, count)
    final = memory_of(done.u[:, :, -1])
    whole = StatePass(done.v_new, done.states, final)
    return walk_again(x, intra, memory, whole, options, done.spoiled), first.phi


def state_bwd_in_pieces(
    x: Tokens,
    intra: IntraChunk,
    d_o: jax.Array,
    local: LocalGradients,
    d_final: Memory,
    phi: jax.Array | None,
    options: Options,
) -> StateGradients:
    """The state pass from the last chunk to the first, with `phi` of the pass forward."""
    count = piece_count(x.sizes, options)
    if count == 1:
        return state_bwd(x, intra, d_o, local, d_final, options)
    # behind the row d_final, behind the pieces before nothing yet
    d = before_nothing(states_of(d_final), count - 1)
    starts = walks_back(x, intra, d_o, local, d, None, options, count)
    d = starts.d
    kept = kept_by(intra.factors, range(1, count - 1), count)
    for j in reversed(range(1, count - 1)):
        d = link(d, phi, (j - 1, j, j - 1), options, kept=kept, back=True)
    local = local._replace(d_v_new=local.d_v_new._replace(data=starts.d_v.data))
    done = walks_back(x, intra, d_o, local, d, starts, options, count)
    return StateGradients(done.d_v, done.d_states, memory_of(done.d[:, :, 0]))


def states_of(memory: Memory) -> jax.Array:
    """S and N of a memory, or their gradients, `[B, HV, 2 K, V]`."""
    return jnp.concatenate([memory.s, -memory.m], axis=2)


def before_nothing(last: jax.Array, slots: int) -> jax.Array:
    """Of the last slot these states, of those before zeros, `[B, HV, slots, 2 K, V]`."""
    return jnp.pad(last[:, :, None], ((0, 0), (0, 0), (slots - 1, 0), (0, 0), (0, 0)))


def memory_of(states: jax.Array) -> Memory:
    """Of S and N `[B, HV, 2 K, V]`, or their gradients."""
    s, n = jnp.split(states, 2, axis=2)
    return Memory(s, -n)


def kept_by(factors: jax.Array, pieces: range, count: int) -> jax.Array:
    """Whether some of a row's `count` pieces keep something of what enters them, int32.

    `[B, HV, pieces]`.
    """
    scalars = factors[:, :, :, FactorRow.SCALARS, STATE_SCALARS[0] : STATE_SCALARS[-1] + 1]
    nothing = jnp.all(scalars == 0, axis=3)
    chunks, own = nothing.shape[2], jnp.arange(pieces.start, pieces.stop)
    chunk = jnp.arange(chunks)[:, None]
    inside = first_chunk(own, chunks, count) <= chunk
    inside &= chunk < first_chunk(own + 1, chunks, count)
    return (~jnp.any(nothing[..., None] & inside, axis=2)).astype(jnp.int32)
