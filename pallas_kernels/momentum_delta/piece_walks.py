"""The launches of rows in pieces: all pieces but one, or all, walk beside each other.

What a walk does is in state_fwd.py and state_bwd.py, and which launch follows which in pieces.py.
A launch stores what the pieces give whose entering states are known, and of the others the ends.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import kernel_call
from pallas_kernels.momentum_delta.block_specs import PieceSpecs
from pallas_kernels.momentum_delta.dv_local_bwd import LocalGradients
from pallas_kernels.momentum_delta.register_layout import RegisterLayout
from pallas_kernels.momentum_delta.state_bwd import walk_back
from pallas_kernels.momentum_delta.state_fwd import walk
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


class Ends(NamedTuple):
    """What the first launch forward gives.

    Attributes:
      v_new: of the first piece; None of a stretch, whose first piece is as the others.
      states: the same.
      u: states at the ends of the pieces but the last `[B, HV, P - 1, 2 K, V]` float32, S and then
        N: of the first as they are, of the others from zero. Of a stretch: of all P, from zero.
      phi: maps of the pieces between `[B, HV, P - 2, 2 K, 2 K]` float32; None where none is. Of a
        stretch: of all P.
    """

    v_new: Leaf
    states: Leaf
    u: Leaf
    phi: Leaf | None


class Walked(NamedTuple):
    """What the last launch forward gives.

    Attributes:
      v_new: of all pieces.
      states: of all pieces.
      u: states behind the pieces but the first, `[B, HV, P - 1, 2 K, V]` float32; of a stretch:
        behind all P.
      spoiled: zero, or nan where a piece's last states are not finite, `[B, HV, P - 1, blocks]`; of
        a stretch: of all P.
    """

    v_new: Values
    states: States
    u: Leaf
    spoiled: Leaf


class Starts(NamedTuple):
    """What a launch backward gives.

    Attributes:
      d_v: of the last piece; of the last launch, of all; of the first of a stretch, None.
      d_states: the same.
      d: gradients of states `[B, HV, P - 1, 2 K, V]` float32. Of the first launch: before the
        pieces but the first; before the last as they are, before the others from no gradient
        behind. Of the last launch: before the pieces but the last. Of a stretch: before all P.
    """

    d_v: Leaf
    d_states: Leaf
    d: Leaf


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


def ends(
    x: Tokens,
    intra: IntraChunk,
    memory: Memory | None,
    options: Options,
    count: int,
    *,
    every: bool = False,
    done: Ends | None = None,
) -> Ends:
    """The first launch forward.

    Args:
      x: tokens and gates.
      intra: of the chunks.
      memory: that enters the first piece; None means zeros.
      options: of the call.
      count: of pieces.
      every: all of them from zero, with their maps; nothing is stored but ends.
      done: those ends, of which the ones that are not finite are walked again, with care.
    """
    z, tiles, storage = x.sizes, options.tiles, options.numerics.storage
    block = tiles.state_fwd_block_v
    specs = PieceSpecs(z, block, count, first=0, maps=every or count > 2, every=every)
    tokens, token_specs = _tokens_forward(x, intra, specs)
    out_specs: Any
    out_shape: Any
    out_specs, out_shape = _outputs(z, specs, block, storage)
    slots, maps = (count, count) if every else (count - 1, count - 2)
    if every:
        out_specs, out_shape = (None, None), (None, None)
    u = _states_of_pieces(z, slots, z.value_dim)
    phi = _states_of_pieces(z, maps, 2 * z.key_dim) if maps > 0 else None
    places = Ends(out_specs[0], out_specs[1], specs.ends(), specs.phi())
    at = len(jax.tree.leaves(tokens)) + len(jax.tree.leaves(memory))
    result: Ends = kernel_call(
        partial(
            _ends if done is None else _ends_again,
            specs=specs,
            warps=tiles.state_fwd_warps,
            precision=options.numerics.products,
            storage=storage,
        ),
        tokens,
        memory,
        done,
        name="mdn_state_fwd_ends" + ("" if done is None else "_again"),
        grid=specs.grid,
        in_specs=[
            token_specs,
            None if memory is None else specs.memory(),
            None if done is None else places,
        ],
        out_specs=places,
        out_shape=Ends(out_shape[0], out_shape[1], u, phi),
        aliases={at + i: i for i in range(len(jax.tree.leaves(done)))},
        warps=tiles.state_fwd_warps,
        stages=tiles.state_fwd_stages if done is None else 1,
        interpret=options.interpret,
    )
    return result


def _ends_again(tokens, memory, done, out, *, specs, **walk):
    """Of a piece whose end is not finite: what is of another document is not there."""
    place, stretch = specs.place(), specs.stretch()  # the interpreter has no programs in a branch
    ends = (
        jnp.where(place.has_values, done.u[...], 0.0),
        jnp.where(place.has_values, 0.0, done.phi[...]),
    )
    found = sum(jnp.sum(x * 0.0) for x in ends)
    again = partial(_walk_to_ends, tokens, memory, out, specs, place, stretch, **walk)
    pl.when(found != 0.0)(partial(again, carefully=True))


def _ends(tokens, memory, _, out, *, specs, **walk):
    _walk_to_ends(tokens, memory, out, specs, specs.place(), None, **walk)


def _walk_to_ends(
    tokens, memory, out, specs, place, stretch, *, warps, precision, storage, carefully=False
):
    rows, block = out.u.shape
    key_dim = rows // 2
    layout = RegisterLayout(warps, block)
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
        None if out.v_new is None else out,
        (s, n),
        specs.stretch() if stretch is None else stretch,
        layout,
        precision,
        storage=storage,
        carefully=carefully,
        has_values=has_values,
        stores=is_first,
    )
    for first, tile in ((0, s), (key_dim, n)):
        layout.store(tile, out.u, first=first, where=has_values)
        if out.phi is not None:
            layout.store(tile, out.phi, first=first, where=~has_values)


def from_ends(
    x: Tokens, intra: IntraChunk, written: Any, u: jax.Array, options: Options, count: int
) -> Walked:
    """The last launch forward; what the first has `written` stays where it is.

    Where it has written nothing, all pieces are walked, each from its `u`.
    """
    z, tiles, storage = x.sizes, options.tiles, options.numerics.storage
    block, every = tiles.state_fwd_block_v, written is None
    specs = PieceSpecs(z, block, count, first=0 if every else 1, every=every)
    tokens, token_specs = _tokens_forward(x, intra, specs)
    out_specs, out_shape = _outputs(z, specs, block, storage)
    spoiled = (*u.shape[:3], z.value_dim // block)
    at, results = len(jax.tree.leaves(tokens)) + 1, len(jax.tree.leaves(out_shape))
    result: Walked = kernel_call(
        partial(
            _from_ends,
            specs=specs,
            warps=tiles.state_fwd_warps,
            precision=options.numerics.products,
        ),
        tokens,
        u,
        written,
        name="mdn_state_fwd",
        grid=specs.grid,
        in_specs=[token_specs, specs.ends(), None if every else out_specs],
        out_specs=Walked(*out_specs, specs.ends(), specs.spoiled()),
        out_shape=Walked(
            *out_shape,
            jax.ShapeDtypeStruct(u.shape, u.dtype),
            jax.ShapeDtypeStruct(spoiled, jnp.float32),
        ),
        # a program puts the states behind its piece where it found those before it
        aliases={at - 1: results, **{at + i: i for i in range(len(jax.tree.leaves(written)))}},
        warps=tiles.state_fwd_warps,
        stages=tiles.state_fwd_stages,
        interpret=options.interpret,
    )
    return result


def _from_ends(tokens, u, _, out, *, specs, warps, precision):
    rows, block = u.shape
    layout, key_dim = RegisterLayout(warps, block), rows // 2
    entering = layout.load(u, key_dim), layout.load(u, key_dim, first=key_dim)
    storage = out.v_new.data.dtype
    s, n = walk(tokens, out, entering, specs.stretch(), layout, precision, storage=storage)
    layout.store(s, out.u)
    layout.store(n, out.u, first=key_dim)
    out.spoiled[0] = jnp.sum(s * 0.0 + n * 0.0)


def walks_back(
    x: Tokens,
    intra: IntraChunk,
    d_o: jax.Array,
    local: LocalGradients,
    d: jax.Array,
    done: Starts | None,
    options: Options,
    count: int,
    *,
    every: bool = False,
) -> Starts:
    """A launch backward: the first, or the last, from `d` behind each of its pieces.

    Args:
      x: tokens and gates.
      intra: of the chunks.
      d_o: gradient of the outputs.
      local: of the chunks.
      d: gradients of the states behind the pieces that are walked, whose memory is taken.
      done: what the first launch gave; None: this is the first.
      options: of the call.
      count: of pieces.
      every: all of them; the first launch stores nothing but `d`.
    """
    z, tiles, storage = x.sizes, options.tiles, options.numerics.storage
    block = tiles.state_bwd_block_v
    specs = PieceSpecs(z, block, count, first=1 if done is None and not every else 0, every=every)
    keys, values = specs.keys(z.heads), specs.values()
    p = None if x.p is None else specs.keys(z.p_heads)
    scales = local.d_o_scale, local.d_v_new.scale
    tokens = (x.q, *intra.walk_keys(x), d_o, scales, local.d_v_new.data)
    token_specs = (keys, keys, p, values, tuple(map(specs.scales_of, scales)), values)
    out_specs: Any
    out_shape: Any
    out_specs, out_shape = _outputs(z, specs, block, storage)
    after = len(jax.tree.leaves(tokens))
    written = written_specs = None
    if every and done is None:
        out_specs, out_shape = (None, None), (None, None)
    elif done is not None and done.d_v is not None:
        written = done.d_v._replace(data=None), done.d_states
        written_specs = out_specs[0]._replace(data=None), out_specs[1]
    results = len(jax.tree.leaves(out_shape))
    # a program puts the gradients before its piece where it found those behind it
    aliases = {after: results} | ({after - 1: 0} if results else {})
    aliases |= {after + 1 + i: 1 + i for i in range(len(jax.tree.leaves(written)))}
    result: Starts = kernel_call(
        partial(
            _starts,
            specs=specs,
            stores_of=count - 1 if done is None and not every else None,
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
        out_specs=Starts(out_specs[0], out_specs[1], specs.ends()),
        out_shape=Starts(out_shape[0], out_shape[1], jax.ShapeDtypeStruct(d.shape, d.dtype)),
        aliases=aliases,
        warps=tiles.state_bwd_warps,
        stages=tiles.state_bwd_stages,
        interpret=options.interpret,
    )
    return result


def _starts(tokens, d, _, intra, out, *, specs, stores_of, warps, storage, precision):
    rows, block = d.shape
    layout, key_dim = RegisterLayout(warps, block), rows // 2
    leaving = layout.load(d, key_dim), layout.load(d, key_dim, first=key_dim)
    stores = None if stores_of is None else specs.place().piece == stores_of
    stretch = specs.stretch()
    tiles = walk_back(
        tokens,
        intra,
        None if out.d_v is None else out,
        leaving,
        stretch,
        layout,
        storage,
        precision,
        stores=stores,
    )
    for first, tile in zip((0, key_dim), tiles, strict=True):
        layout.store(tile, out.d, first=first)
