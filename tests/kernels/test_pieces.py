"""State passes of rows in pieces against those of whole rows, and how many pieces there are.

Values and gradients of the operator in pieces are those of tests/ops/conformance.
"""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from mdn_jax.ops.inputs import document_starts
from mdn_jax.testing import GATE_REGIMES, random_cotangents, random_inputs, relative_errors
from pallas_kernels.momentum_delta import Memory, Tokens
from pallas_kernels.momentum_delta.api import _reset
from pallas_kernels.momentum_delta.block_scaling import dequantize
from pallas_kernels.momentum_delta.dv_local_bwd import dv_local_bwd
from pallas_kernels.momentum_delta.intra_chunk_fwd import intra_chunk_fwd
from pallas_kernels.momentum_delta.numerics import Numerics
from pallas_kernels.momentum_delta.pieces import state_bwd_in_pieces, state_fwd_in_pieces
from pallas_kernels.momentum_delta.types import Options
from pallas_kernels.tiling import KEY_DIMS, choose_pieces, choose_tiles
from tests.kernels.helpers import SMALL

CHUNKS = 8


def tokens(dtype, **change):
    """A row a regime, packed documents, and memory entering; two value heads a key head."""
    sizes = {"batch": len(GATE_REGIMES), "length": 64 * CHUNKS, "heads": 1, "value_heads": 2}
    inputs = random_inputs(
        seed=3, key_dim=16, value_dim=32, dtype=dtype, regime=tuple(GATE_REGIMES), **sizes, **change
    )
    d_o, d_state = random_cotangents(inputs)
    x = Tokens(**{name: inputs.get(name) for name in Tokens._fields})
    if "segment_ids" in inputs:
        x = _reset(x, document_starts(inputs["segment_ids"], x.v.shape[:2]))
    return x, Memory(*inputs["initial_state"]), d_o, Memory(*d_state)


def options(dtype, pieces):
    numerics = Numerics(jnp.dtype(dtype), interpret=True)
    return Options(0.25, True, SMALL._replace(pieces=pieces), numerics)


@partial(jax.jit, static_argnums=0)
def chunks(dtype, x, d_o):
    fixed = options(dtype, 1)
    intra = intra_chunk_fwd(x, fixed)
    return intra, dv_local_bwd(x, intra, d_o, fixed)


@partial(jax.jit, static_argnums=(0, 1))
def passes(dtype, pieces, x, memory, d_o, d_final, of_chunks):
    """What both state passes give, as it is: no block has a scale of its own."""
    fixed = options(dtype, pieces)
    intra, local = of_chunks
    (v_new, states, final), phi = state_fwd_in_pieces(x, intra, memory, fixed)
    d_v, d_states, d_memory = state_bwd_in_pieces(x, intra, d_o, local, d_final, phi, fixed)
    return {
        "v_new": dequantize(v_new, jnp.float32),
        "final": final,
        "d_v": dequantize(d_v, jnp.float32),
        "d_memory": d_memory,
        **{f"states.{name}": _whole(states, y) for name, y in zip("sn", states[:2], strict=True)},
        **{
            f"d_states.{name}": _whole(d_states, y) for name, y in zip("sn", d_states, strict=False)
        },
    }


def _whole(states, tile):
    if states.scale is None:
        return tile
    columns = tile.shape[-1] // states.scale.shape[-1]
    return tile.astype(jnp.float32) * jnp.repeat(states.scale, columns, axis=-1)[..., None, :]


def rows(tree, row):
    return jax.tree.map(lambda y: y[row], tree)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "limit", "documents"), [("float32", 2e-6, 1), ("bfloat16", 2e-3, 3)]
)
def test_pieces_are_the_whole(dtype, limit, documents):
    """No result is further off than it is rounded. Of 7 pieces the first has two chunks."""
    x, memory, d_o, d_final = tokens(dtype, documents=documents)
    of_chunks = chunks(dtype, x, d_o)
    whole = passes(dtype, 1, x, memory, d_o, d_final, of_chunks)
    for pieces in (2, 7) if dtype == "float32" else (4,):
        cut = passes(dtype, pieces, x, memory, d_o, d_final, of_chunks)
        for row, regime in enumerate(GATE_REGIMES):
            errors = relative_errors(rows(cut, row), rows(whole, row))
            worst = max(errors, key=errors.get)
            assert errors[worst] <= limit, (pieces, regime, worst, errors[worst])


@pytest.mark.parametrize(
    ("batch", "length", "heads", "dims"),
    [(8, 4096, 6, (128, 256)), (2, 16384, 6, (128, 256)), (4, 4096, 6, (256, 512))],
)
def test_rows_that_fill_the_device_stay_whole(batch, length, heads, dims):
    assert choose_pieces(*dims, batch * heads, length // 64) == 1


@pytest.mark.parametrize("key_dim", KEY_DIMS)
def test_long_rows_of_few_heads_are_cut(key_dim):
    """The longer the row, the more it gains; no piece is shorter than a chunk."""
    assert choose_pieces(key_dim, 256, 2, 2048) > 2
    for chunks_of_a_row in (1, 2, 5, 20):
        assert choose_pieces(key_dim, 256, 2, chunks_of_a_row) <= chunks_of_a_row


def test_only_tiles_of_known_times_are_cut_but_for_those_who_ask():
    choose = partial(choose_tiles, 128, 256, heads=2, chunks=2048)
    assert choose(2, (9, 0)).pieces > 1
    others = (choose(2, (8, 0)), choose(4, (9, 0)), choose(2, (9, 0), explicit_p=True))
    assert [x.pieces for x in (*others, choose(2, (9, 0), precise=True))] == [1] * 4
    assert choose(4, (9, 0), pieces=5).pieces == 5
    # of pieces enough blocks are not narrow
    assert choose(2, (9, 0), pieces=1).state_fwd_block_v == 16
    assert choose(2, (9, 0)).state_fwd_block_v == 32
