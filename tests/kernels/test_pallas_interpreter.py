"""The interpreter's smaller programs give what JAX's own give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

pallas_interpreter = pytest.importorskip("tests.pallas_interpreter", exc_type=Exception)


def body(rows, kept, sums, total, scratch):
    """Reads in a loop, reads and writes one array, writes one row and leaves the other out."""
    scratch[:] = jnp.zeros_like(scratch)

    def add(i, _):
        scratch[:] += rows[i, :] * (1 + kept[0, :])

    lax.fori_loop(0, rows.shape[0], add, None)
    sums[0, pl.ds(0, 4)] = scratch[pl.ds(4, 4)]
    total[0, :] = kept[0, :] + scratch[:]


def run(x, y):
    block = pl.BlockSpec((4, 8), lambda i: (i, 0))
    row = pl.BlockSpec((2, 8), lambda i: (i, 0))
    return pl.pallas_call(
        body,
        grid=(3,),
        in_specs=[block, row],
        out_specs=[row, row],
        out_shape=[jax.ShapeDtypeStruct((6, 8), jnp.float32)] * 2,
        input_output_aliases={1: 1},
        scratch_shapes=[pl.MemorySpace.ANY((8,), jnp.float32)],
        interpret=True,
    )(x, y)


def test_results_are_those_of_jax(monkeypatch):
    x = jnp.arange(96.0).reshape(12, 8)
    y = jnp.arange(48.0).reshape(6, 8)
    smaller = jax.jit(lambda *arrays: run(*arrays)).lower(x, y)
    for module, name, original in pallas_interpreter.ORIGINALS:
        assert getattr(module, name) is not original
        monkeypatch.setattr(module, name, original)
    whole = jax.jit(lambda *arrays: run(*arrays)).lower(x, y)
    count = [text.as_text().count("stablehlo.dynamic_update_slice") for text in (smaller, whole)]
    assert count[0] < count[1]
    for actual, expected in zip(smaller.compile()(x, y), whole.compile()(x, y), strict=True):
        np.testing.assert_array_equal(actual, expected)
        assert np.isfinite(actual).any()
