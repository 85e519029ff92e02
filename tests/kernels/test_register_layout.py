"""The order of columns in which kernels hold values, and two tiles as one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.lowering import kernel_call
from pallas_kernels.momentum_delta.register_layout import RegisterLayout, join, split

TILES = [(16, 16, 4), (32, 32, 4), (64, 32, 4), (64, 32, 8), (128, 64, 4), (256, 32, 8)]


def run(body, x, shape):
    """`body(ref, out)` as a kernel of one program."""
    return kernel_call(
        body,
        x,
        name="test",
        grid=(1,),
        in_specs=[pl.BlockSpec()],
        out_specs=pl.BlockSpec(),
        out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
        warps=4,
        stages=1,
        interpret=True,
    )


def places(rows, columns):
    return jnp.arange(2 * rows * columns, dtype=jnp.float32).reshape(2, rows, columns)


def load(ref, out, *, layout, rows, count):
    out[...] = layout.load(ref, count, 1, first=rows - count)


def store(ref, out, *, layout, rows, count):
    out[...] = jnp.full(out.shape, jnp.nan)
    layout.store(ref[1, rows - count :, :], out, 1, first=rows - count)


@pytest.mark.parametrize(("rows", "columns", "warps"), TILES)
def test_rows_keep_their_places_and_columns_share_one_order(rows, columns, warps):
    """Products of tiles of all heights agree only if the order depends on nothing but columns."""
    layout, x = RegisterLayout(warps, columns), places(rows, columns)
    group = min(columns, 32)
    block, eight, lane, one = np.unravel_index(
        np.arange(columns), (columns // group, group // 8, 4, 2)
    )
    order = group * block + group // 4 * lane + 2 * eight + one
    np.testing.assert_array_equal(layout.order(), order)
    for count in sorted({rows, min(rows, 64)}):
        body = partial(load, layout=layout, rows=rows, count=count)
        np.testing.assert_array_equal(run(body, x, (count, columns)), x[1, rows - count :, order].T)


@pytest.mark.parametrize(("rows", "columns", "warps"), TILES)
def test_a_stored_tile_is_where_loads_find_it(rows, columns, warps):
    layout, x = RegisterLayout(warps, columns), places(rows, columns)
    count = min(rows, 64)
    cut = {"layout": layout, "rows": rows, "count": count}
    stored = run(partial(store, **cut), x, x.shape)
    np.testing.assert_array_equal(
        run(partial(load, **cut), stored, (count, columns)), x[1, rows - count :]
    )
    outside = np.isnan(stored)
    assert outside[0].all()
    assert outside[1, : rows - count].all()
    assert not outside[1, rows - count :].any()


def test_joined_tiles_have_eight_columns_of_either_in_turn():
    a = jnp.arange(3 * 16.0).reshape(3, 16)
    b = -a - 1
    both = join(a, b)
    for first, tile in ((0, a[:, :8]), (8, b[:, :8]), (16, a[:, 8:]), (24, b[:, 8:])):
        np.testing.assert_array_equal(both[:, first : first + 8], tile)
    for tile, expected in zip(split(both), (a, b), strict=True):
        np.testing.assert_array_equal(tile, expected)
