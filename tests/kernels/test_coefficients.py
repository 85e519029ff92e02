"""Coefficients of a chunk, outside of a kernel: the inverse in float16 and where it must not be."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.momentum_delta.coefficients import (
    diagonal,
    lower_quarters,
    squares,
    unit_lower_inverse,
)

SIZE = 64


def inverse(lower, *, float16):
    quarters = lower_quarters(jnp.asarray(lower, jnp.float32))
    x = unit_lower_inverse(quarters, lax.Precision.HIGHEST, float16=float16)
    return np.block([[x.first, np.zeros_like(x.first)], [x.corner, x.second]])


def strictly_lower(scale, *, seed=0):
    return np.tril(scale * np.random.default_rng(seed).normal(size=(SIZE, SIZE)), -1)


@pytest.mark.parametrize("lower", [strictly_lower(0.2), np.tril(np.full((SIZE, SIZE), 0.9), -1)])
def test_inverse(lower):
    expected = np.linalg.inv(np.eye(SIZE) + lower)
    for float16, tolerance in ((False, 2e-6), (True, 2e-3)):
        error = inverse(lower, float16=float16) - expected
        assert np.linalg.norm(error) <= tolerance * np.linalg.norm(expected)


def test_float16_is_used_where_it_fits():
    lower = strictly_lower(0.2)
    assert (inverse(lower, float16=True) != inverse(lower, float16=False)).any()


@pytest.mark.parametrize("scale", [2.0, 1e6])
def test_what_leaves_the_range_of_float16_is_computed_without(scale):
    """Entries beyond 65,504 on the way or from the start."""
    lower = strictly_lower(scale)
    lower[40:] *= 1e-3 / scale  # the inverse itself is representable in float32
    if scale > 1e3:
        lower[:, 3:] *= 1e-6
    exact = inverse(lower, float16=False)
    assert np.isfinite(exact).all()
    assert np.abs(exact).max() > 65_504
    np.testing.assert_array_equal(inverse(lower, float16=True), exact)


def test_nan_stays():
    lower = strictly_lower(0.2)
    lower[20, 4] = np.nan
    assert np.isnan(inverse(lower, float16=True)).any()


def test_norms_of_the_diagonal_are_those_of_the_rows():
    keys = jnp.asarray(np.random.default_rng(0).normal(size=(32, 48)), jnp.bfloat16)
    products = jnp.dot(keys, keys.T, preferred_element_type=jnp.float32)
    np.testing.assert_allclose(diagonal(products), squares(keys), rtol=1e-6)
