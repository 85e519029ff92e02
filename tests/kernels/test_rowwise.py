"""The kernels along rows in the interpreter, against JAX's derivatives of the definitions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdn_jax.testing import relative_errors
from pallas_kernels.offline_compile import lowered
from pallas_kernels.rowwise import Norm, cross_entropy_fwd, rms_norm_bwd, swiglu_bwd
from tests.kernels.addresses import offsets


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def test_cross_entropy(monkeypatch):
    """Three rounds of two blocks, the last ragged; an ignored and an unknown target."""
    monkeypatch.setattr("pallas_kernels.rowwise.cross_entropy._COLUMNS", 8)
    monkeypatch.setattr("pallas_kernels.rowwise.cross_entropy._UNROLL", 2)
    logits = 30 * normal(5, 43)
    logits = logits.at[1, :8].set(-jnp.inf).at[:, 41:].set(1e4)  # behind the vocabulary
    targets = jnp.asarray([3, 40, -100, -1, 9])
    options = {"vocab": 41, "ignored": -100, "unknown": -1, "dtype": jnp.float32}
    loss, gradient = cross_entropy_fwd(logits, targets, **options, interpret=True)
    rows = np.asarray(logits, np.float64)[:, :41]
    z = np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1)) + rows.max(1)
    hot = np.arange(41) == np.asarray(targets)[:, None]
    d = np.pad(np.exp(rows - z[:, None]) - hot, ((0, 0), (0, 2)))
    for row in (0, 1, 4):
        np.testing.assert_allclose(
            loss[row], z[row] - rows[row, targets[row]], rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(gradient[row], d[row], rtol=1e-4, atol=1e-6)
    assert loss[2] == 0
    assert not gradient[2].any()
    assert jnp.isnan(loss[3])
    assert jnp.isnan(gradient[3, :41]).all()


@pytest.mark.parametrize(
    ("width", "gate", "past", "again"), [(12, "silu", False, True), (16, "sigmoid", True, False)]
)
def test_gated_norm(monkeypatch, x64, width, gate, past, again):
    """Rows that fill no program evenly, several rounds each; also with a gradient past the norm."""
    monkeypatch.setattr("pallas_kernels.rowwise.rms_norm._PROGRAMS", 3)
    monkeypatch.setattr("pallas_kernels.rowwise.rms_norm._ELEMENTS", 32)
    x, d_y, g, r = (normal(19, width, seed=i, dtype=jnp.float32) for i in range(4))
    scale = normal(width, seed=5, dtype=jnp.float32)
    activation = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}[gate]

    def norm(x, scale, gate):
        y = x / jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True) + 1e-3) * scale
        return y * activation(gate)

    y, pull = jax.vjp(norm, *(a.astype(jnp.float64) for a in (x, scale, g)))
    d_x, d_scale, d_gate = pull(d_y.astype(jnp.float64))
    run = partial(rms_norm_bwd, Norm(1e-3, gate, again=again, interpret=True))
    actual = run(x, scale, g, d_y, r if past else None)
    expected = d_x + (r if past else 0), d_scale, d_gate, y if again else None
    errors = relative_errors(actual, expected)
    assert max(errors.values()) <= 1e-6, errors


def test_plain_norm_of_16_bits():
    x, d_y = (normal(2, 3, 16, seed=i, dtype=jnp.bfloat16) for i in range(2))
    scale = normal(16)
    run = partial(rms_norm_bwd, Norm(1e-6, interpret=True))
    d_x, d_scale, *others = run(x, scale, None, d_y)
    assert (d_x.dtype, d_scale.dtype, others) == (jnp.bfloat16, jnp.float32, [None, None])

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale

    expected = jax.vjp(norm, x.astype(jnp.float32), scale)[1](d_y.astype(jnp.float32))
    assert max(relative_errors((d_x, d_scale), expected).values()) <= 4e-3


def test_swiglu(x64):
    """Rows and columns that fill no program."""
    both, d_y = normal(11, 2 * 21, dtype=jnp.float32), normal(11, 21, seed=1, dtype=jnp.float32)

    def swiglu(both):
        gate, up = jnp.split(both.astype(jnp.float64), 2, axis=1)
        return jax.nn.silu(gate) * up

    y, pull = jax.vjp(swiglu, both)
    expected = *pull(d_y.astype(jnp.float64)), y
    errors = relative_errors(swiglu_bwd(both, d_y, interpret=True), expected)
    assert max(errors.values()) <= 1e-6, errors


def like(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


WIDE = like(2**22, 6, 256)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (swiglu_bwd, (like(2**20, 2 * 2816), like(2**20, 2816))),
        (partial(rms_norm_bwd, Norm(1e-5)), (WIDE, like(256), None, WIDE, WIDE)),
        (partial(rms_norm_bwd, Norm(1e-5, "silu", again=True)), (WIDE, like(256), WIDE, WIDE)),
        (
            partial(cross_entropy_fwd, vocab=50257, ignored=-100, unknown=-1, dtype=jnp.bfloat16),
            (like(60_000, 50_304, dtype=jnp.float32), like(60_000, dtype=jnp.int32)),
        ),
    ],
    ids=["swiglu", "norm", "gated_norm", "cross_entropy"],
)
def test_no_index_overflows(function, arguments):
    """Arrays of more than 2^31 elements, as they lower for a GPU."""
    (kernel,) = lowered(function, (9, 0), *arguments)
    assert max(int(offset.max()) for offset in offsets(kernel)) >= 2**31
