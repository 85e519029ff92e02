"""Products over windows against plain loops, and what they say about the operator."""

import numpy as np
import pytest

from mdn_jax import analysis
from tests.analysis.helpers import numpy_matrices, operator_rows, random_gates


def test_spectral_norm_is_the_largest_singular_value(x64):
    matrices = np.random.default_rng(0).normal(size=(10_000, 2, 2))
    matrices[:100, 1] = matrices[:100, 0]  # singular
    matrices[100] = 0
    expected = np.linalg.svd(matrices, compute_uv=False)[:, 0]
    np.testing.assert_allclose(analysis.spectral_norm(matrices), expected, rtol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 3, 7, 8, 20, 21])
def test_window_products(x64, window):
    matrices = numpy_matrices(*random_gates(1, (3, 21)))
    actual = analysis.window_products(matrices, window)
    assert actual.shape == (3, 22 - window, 2, 2)
    for start in range(22 - window):
        expected = np.broadcast_to(np.eye(2), (3, 2, 2))
        for t in range(start, start + window):
            expected = matrices[:, t] @ expected
        np.testing.assert_allclose(actual[:, start], expected, rtol=0, atol=1e-12)
        norm = np.linalg.norm(expected, 2, axis=(-2, -1))
        growth = analysis.window_growth(matrices, window)[:, start]
        np.testing.assert_allclose(growth, norm, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "least"),
    [
        # both stable as constant gates, far outside of the published bounds
        ((0.986, 0.078, 0.141, 1.884), (0.309, 0.969, 3.772, 1.842), 8.0),
        # both with beta <= 1 - alpha
        ((0.9805, 0.3548, 0.0189, 1.9271), (0.1066, 0.922, 0.8931, 0.1924), 1.1),
    ],
)
def test_stable_steps_may_grow_together(x64, first, second, least):
    """Constant gates of either step decay; the two in turn grow without bound."""
    steps = 60
    gates = [np.tile(pair, steps // 2)[None] for pair in zip(first, second, strict=True)]
    assert bool(analysis.is_stable(*gates).all())
    values = np.zeros((1, steps))
    values[:, 0] = 1.0
    memory = np.abs(operator_rows(*gates, values, seed=2)[0][0])
    product = analysis.window_products(analysis.transition(*gates)[0], 2)[0]
    radius = np.abs(np.linalg.eigvals(product)).max()
    assert radius > least
    np.testing.assert_allclose(memory[-1] / memory[-3], radius, rtol=1e-6)
    assert analysis.window_growth(analysis.transition(*gates)[0], 2)[0] >= radius


def test_the_published_bounds_of_one_head_are_not_seen_to_grow(x64):
    """A search, not a proof: pairs of steps of one head, often at the bounds."""
    rng = np.random.default_rng(3)
    count = 100_000
    factor = rng.uniform(0, 4, count)

    def gates():
        eta = rng.uniform(0, 2, count)
        cos2 = 1 / (1 + np.square(eta * factor))
        alpha, beta = (
            bound * np.where(rng.random(count) < 0.5, 1.0, rng.random(count))
            for bound in (cos2, 1 - cos2)
        )
        return alpha, rng.random(count) ** 0.2, beta, eta

    first, second = numpy_matrices(*gates()), numpy_matrices(*gates())
    assert np.abs(np.linalg.eigvals(second @ first)).max() < 1


@pytest.mark.parametrize(
    ("shape", "window", "message"),
    [
        ((5, 2, 2), 0, "window: expected an int from 1 to T = 5, got 0"),
        ((5, 2, 2), 6, "window: expected an int from 1 to T = 5, got 6"),
        ((2, 2), 1, r"matrices: expected \[\.\.\., T, 2, 2\], got \[2, 2\]"),
        ((5, 2, 3), 1, r"got \[5, 2, 3\]"),
    ],
)
def test_bad_windows_are_named(shape, window, message):
    with pytest.raises(ValueError, match=message):
        analysis.window_growth(np.zeros(shape), window)


def test_a_scalar_has_no_impulse_response():
    with pytest.raises(ValueError, match=r"alpha: expected \[\.\.\., T\]"):
        analysis.impulse_response(0.5, 0.5, 0.5, 1.0)
