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

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lowering import kernel_call
from pallas_kernels.momentum_delta.block_specs import PieceSpecs, first_chunk
from pallas_kernels.momentum_delta.dv_local_bwd import LocalGradients
from pallas_kernels.momentum_delta.piece_link import link
from pallas_kernels.momentum_delta.register_layout import RegisterLayout
from pallas_kernels.momentum_delta.rows import STATE_SCALARS, FactorRow
from pallas_kernels.momentum_delta.state_bwd import StateGradients, state_bwd, walk_back
from pallas_kernels.momentum_delta.state_fwd import StatePass, state_fwd, walk, walk_again
from pallas_kernels.momentum_delta.types import (
    IntraChunk,
    Leaf,
    Memory,
    Options,
    Sizes,
    States,
    Tokens,
    Values,
    WalkKeys,
)


class _Ends(NamedTuple):
    """What the first launch forward gives.

    Attributes:
      v_new: of the first piece.
      states: of the first piece.
      u: states at the ends of the pieces but the last `[B, HV, P - 1, 2 K, V]` float32, S and then
        N: of the first as they are, of the others from zero.
      phi: maps of the pieces between `[B, HV, P - 2, 2 K, 2 K]` float32; None where none is.
    """

    v_new: Values
    states: States
    u: Leaf
    phi: Leaf | None


class _Walked(NamedTuple):
    """What the last launch forward gives.

    Attributes:
      v_new: of all pieces.
      states: of all pieces.
      u: states behind the pieces but the first, `[B, HV, P - 1, 2 K, V]` float32.
      spoiled: zero, or nan where a piece's last states are not finite, `[B, HV, P - 1, blocks]`.
    """

    v_new: Values
    states: States
    u: Leaf
    spoiled: Leaf


class _Starts(NamedTuple):
    """What a launch backward gives.

    Attributes:
      d_v: of the last piece; of the last launch, of all.
      d_states: the same.
      d: gradients of states `[B, HV, P - 1, 2 K, V]` float32. Of the first launch: before the
        pieces but the first; before the last as they are, before the others from no gradient
        behind. Of the last launch: before the pieces but the last.
    """

    d_v: Values
    d_states: States
    d: Leaf


def _count(z: Sizes, options: Options) -> int:
    """Pieces of a row, each of a chunk at least."""
    return min(options.tiles.pieces, z.chunks)


def state_fwd_in_pieces(
    x: Tokens, intra: IntraChunk, memory: Memory | None, options: Options
) -> tuple[StatePass, jax.Array | None]:
    """The state pass, and `Phi` of the pieces between the first and the last.

    One piece is `state_fwd` itself; fewer than three have no piece between.
    """
    count = _count(x.sizes, options)
    if count == 1:
        return state_fwd(x, intra, memory, options), None
    ends = _ends(x, intra, memory, options, count)
    u = ends.u
    for j in range(1, count - 1):
        u = link(u, ends.phi, (j, j - 1, j - 1), options)
    done = _from_ends(x, intra, (ends.v_new, ends.states), u, options, count)
    final = _memory(done.u[:, :, -1])
    whole = StatePass(done.v_new, done.states, final)
    return walk_again(x, intra, memory, whole, options, done.spoiled), ends.phi


def _memory(states: jax.Array) -> Memory:
    """Of S and N `[B, HV, 2 K, V]`, or their gradients."""
    s, n = jnp.split(states, 2, axis=2)
    return Memory(s, -n)


def _outputs(
    z: Sizes, specs: PieceSpecs, block: int, storage: jnp.dtype
) -> tuple[tuple[Values, States], tuple[Values, States]]:
    """Specifications and shapes of v_new and states, or their gradients."""
    shapes = (
        Values(z.per_head(z.value_dim, storage), z.scales(block, storage)),
        z.states(block, storage),
    )
    return (Values(specs.values(), specs.scales(storage)), specs.states(storage)), shapes


def _states_of_pieces(z: Sizes, count: int, columns: int) -> jax.ShapeDtypeStruct:
    shape = (z.batch, z.value_heads, count, 2 * z.key_dim, columns)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _tokens_forward(x: Tokens, intra: IntraChunk, specs: PieceSpecs) -> tuple[Any, Any]:
    """Operands of the walk forward, and their specifications."""
    z = x.sizes
    p = None if x.p is None else specs.keys(z.p_heads)
    keys = WalkKeys(specs.keys(z.heads), p)
    return (
        (intra.walk_keys(x), x.v, intra.inverse, intra.factors),
        (keys, specs.values(), specs.matrix(), specs.factors()),
    )


def _ends(
    x: Tokens, intra: IntraChunk, memory: Memory | None, options: Options, count: int
) -> _Ends:
    """The first launch forward."""
    z, tiles, storage = x.sizes, options.tiles, options.numerics.storage
    block = tiles.state_fwd_block_v
    specs = PieceSpecs(z, block, count, first=0, maps=count > 2)
    tokens, token_specs = _tokens_forward(x, intra, specs)
    out_specs, out_shape = _outputs(z, specs, block, storage)
    phi = _states_of_pieces(z, count - 2, 2 * z.key_dim) if count > 2 else None
    u = _states_of_pieces(z, count - 1, z.value_dim)
    result: _Ends = kernel_call(
        partial(
            _ends_kernel,
            specs=specs,
            warps=tiles.state_fwd_warps,
            precision=options.numerics.products,
        ),
        tokens,
        memory,
        name="mdn_state_fwd_ends",
        grid=specs.grid,
        in_specs=[token_specs, None if memory is None else specs.memory()],
        out_specs=_Ends(*out_specs, specs.ends(), specs.phi()),
        out_shape=_Ends(*out_shape, u, phi),
        warps=tiles.state_fwd_warps,
        stages=tiles.state_fwd_stages,
        interpret=options.interpret,
    )
    return result


def _ends_kernel(tokens, memory, out, *, specs, warps, precision):
    rows, block = out.u.shape
    key_dim = rows // 2
    layout, place = RegisterLayout(warps, block), specs.place()
    has_values, is_first = place.has_values, place.piece == 0
    s = n = jnp.zeros((key_dim, block), jnp.float32)
    if memory is not None:
        s = layout.load(memory.s, key_dim, where=is_first)
        n = -layout.load(memory.m, key_dim, where=is_first)
    if out.phi is None:
        has_values = None
    else:
        row = lax.broadcasted_iota(jnp.int32, (key_dim, block), 0)
        column = specs.map_columns(place) + layout.order()[None, :]
        s = jnp.where(~has_values & (row == column), 1.0, s)
        n = jnp.where(~has_values & (row + key_dim == column), 1.0, n)
    s, n = walk(
        tokens,
        out,
        (s, n),
        specs.stretch(),
        layout,
        precision,
        has_values=has_values,
        stores=is_first,
    )
    for first, tile in ((0, s), (key_dim, n)):
        layout.store(tile, out.u, first=first, where=has_values)
        if out.phi is not None:
            layout.store(tile, out.phi, first=first, where=~has_values)


def _from_ends(
    x: Tokens, intra: IntraChunk, written: Any, u: jax.Array, options: Options, count: int
) -> _Walked:
    """The last launch forward; what the first has written stays where it is."""
    z, tiles, storage = x.sizes, options.tiles, options.numerics.storage
    block = tiles.state_fwd_block_v
    specs = PieceSpecs(z, block, count, first=1)
    tokens, token_specs = _tokens_forward(x, intra, specs)
    out_specs, out_shape = _outputs(z, specs, block, storage)
    spoiled = (z.batch, z.value_heads, count - 1, z.value_dim // block)
    at, results = len(jax.tree.leaves(tokens)) + 1, len(jax.tree.leaves(written))
    result: _Walked = kernel_call(
        partial(
            _from_ends_kernel,
            specs=specs,
            warps=tiles.state_fwd_warps,
            precision=options.numerics.products,
        ),
        tokens,
        u,
        written,
        name="mdn_state_fwd",
        grid=specs.grid,
        in_specs=[token_specs, specs.ends(), out_specs],
        out_specs=_Walked(*out_specs, specs.ends(), specs.spoiled()),
        out_shape=_Walked(
            *out_shape,
            jax.ShapeDtypeStruct(u.shape, u.dtype),
            jax.ShapeDtypeStruct(spoiled, jnp.float32),
        ),
        # a program puts the states behind its piece where it found those before it
        aliases={at - 1: results, **{at + i: i for i in range(results)}},
        warps=tiles.state_fwd_warps,
        stages=tiles.state_fwd_stages,
        interpret=options.interpret,
    )
    return result


def _from_ends_kernel(tokens, u, _, out, *, specs, warps, precision):
    rows, block = u.shape
    layout, key_dim = RegisterLayout(warps, block), rows // 2
    entering = layout.load(u, key_dim), layout.load(u, key_dim, first=key_dim)
    s, n = walk(tokens, out, entering, specs.stretch(), layout, precision)
    layout.store(s, out.u)
    layout.store(n, out.u, first=key_dim)
    out.spoiled[0] = jnp.sum(s * 0.0 + n * 0.0)


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
    count = _count(x.sizes, options)
    if count == 1:
        return state_bwd(x, intra, d_o, local, d_final, options)
    # behind the row d_final, behind the pieces before nothing yet
    d = jnp.concatenate([d_final.s, -d_final.m], axis=2)[:, :, None]
    d = jnp.pad(d, ((0, 0), (0, 0), (count - 2, 0), (0, 0), (0, 0)))
    starts = _walks_back(x, intra, d_o, local, d, None, options, count)
    d = starts.d
    kept = _kept(intra.factors, count)
    for j in reversed(range(1, count - 1)):
        d = link(d, phi, (j - 1, j, j - 1), options, kept=kept)
    local = local._replace(d_v_new=local.d_v_new._replace(data=starts.d_v.data))
    done = _walks_back(x, intra, d_o, local, d, starts, options, count)
    return StateGradients(done.d_v, done.d_states, _memory(done.d[:, :, 0]))


def _kept(factors: jax.Array, count: int) -> jax.Array:
    """Whether the pieces between keep something of what enters them, `[B, HV, P - 2]` int32."""
    scalars = factors[:, :, :, FactorRow.SCALARS, STATE_SCALARS[0] : STATE_SCALARS[-1] + 1]
    nothing = jnp.all(scalars == 0, axis=3)
    chunks, inner = nothing.shape[2], jnp.arange(1, count - 1)
    chunk = jnp.arange(chunks)[:, None]
    own = first_chunk(inner, chunks, count) <= chunk
    own &= chunk < first_chunk(inner + 1, chunks, count)
    return (~jnp.any(nothing[..., None] & own, axis=2)).astype(jnp.int32)


def _walks_back(
    x: Tokens,
    intra: IntraChunk,
    d_o: jax.Array,
    local: LocalGradients,
    d: jax.Array,
    done: _Starts | None,
    options: Options,
    count: int,
) -> _Starts:
    """A launch backward: the first, or the last, from `d` behind each of its pieces."""
    z, tiles, storage = x.sizes, options.tiles, options.numerics.storage
    block = tiles.state_bwd_block_v
    specs = PieceSpecs(z, block, count, first=1 if done is None else 0)
    keys, values = specs.keys(z.heads), specs.values()
    p = None if x.p is None else specs.keys(z.p_heads)
    scales = local.d_o_scale, local.d_v_new.scale
    tokens = (x.q, *intra.walk_keys(x), d_o, scales, local.d_v_new.data)
    token_specs = (keys, keys, p, values, tuple(map(specs.scales_of, scales)), values)
    out_specs, out_shape = _outputs(z, specs, block, storage)
    after = len(jax.tree.leaves(tokens))
    written = written_specs = None
    if done is not None:
        written = done.d_v._replace(data=None), done.d_states
        written_specs = out_specs[0]._replace(data=None), out_specs[1]
    results = len(jax.tree.leaves(out_shape))
    # a program puts the gradients before its piece where it found those behind it
    aliases = {after - 1: 0, after: results}
    aliases |= {after + 1 + i: 1 + i for i in range(len(jax.tree.leaves(written)))}
    result: _Starts = kernel_call(
        partial(
            _state_bwd_kernel,
            specs=specs,
            stores_of=None if done is not None else count - 1,
            warps=tiles.state_bwd_warps,
            storage=storage,
            precision=options.numerics.products,
        ),
        tokens,
        d,
        written,
        (intra.inverse, intra.factors),
        name="mdn_state_bwd_starts" if done is None else "mdn_state_bwd",
        grid=specs.grid,
        in_specs=[
            token_specs,
            specs.ends(),
            written_specs,
            (specs.matrix(), specs.factors()),
        ],
        out_specs=_Starts(*out_specs, specs.ends()),
        out_shape=_Starts(*out_shape, jax.ShapeDtypeStruct(d.shape, d.dtype)),
        aliases=aliases,
        warps=tiles.state_bwd_warps,
        stages=tiles.state_bwd_stages,
        interpret=options.interpret,
    )
    return result


def _state_bwd_kernel(tokens, d, _, intra, out, *, specs, stores_of, warps, storage, precision):
    rows, block = d.shape
    layout, key_dim = RegisterLayout(warps, block), rows // 2
    leaving = layout.load(d, key_dim), layout.load(d, key_dim, first=key_dim)
    stores = None if stores_of is None else specs.place().piece == stores_of
    stretch = specs.stretch()
    tiles = walk_back(
        tokens, intra, out, leaving, stretch, layout, storage, precision, stores=stores
    )
    for first, tile in zip((0, key_dim), tiles, strict=True):
        layout.store(tile, out.d, first=first)
