"""The region of stability against numpy's eigenvalues and the operator; the published bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import analysis
from mdn_jax.layers.gates import MomentumGates
from tests.analysis.helpers import numpy_matrices, operator_rows, random_gates

COUNT = 200_000


@pytest.mark.parametrize("erase", [None, 1.0, -0.5])
def test_the_region_is_that_of_the_spectral_radius(x64, erase):
    gates = random_gates(0, COUNT, reach=4.0)
    radius = np.abs(np.linalg.eigvals(numpy_matrices(*gates, erase))).max(-1)
    stable = np.asarray(analysis.is_stable(*gates, erase=erase))
    clear = np.abs(radius - 1) > 1e-9
    np.testing.assert_array_equal(stable[clear], radius[clear] < 1)
    assert clear.mean() > 0.999
    assert 0.01 < stable.mean() < 1
    if erase is None:
        np.testing.assert_array_equal(stable, np.asarray(analysis.stability_load(*gates)) < 1)


def test_outside_of_the_region_the_operator_grows(x64):
    rows, steps = 400, 400
    alpha, mu, _, eta = random_gates(1, (rows, 1))
    alpha, eta = np.maximum(alpha, 0.1), np.maximum(eta, 0.1)
    edge = (1 + alpha) * (1 + mu) / (alpha * eta)
    factor = np.where(np.arange(rows)[:, None] % 2, 1.05, 0.95)
    gates = [np.repeat(x, steps, axis=1) for x in (alpha, mu, factor * edge, eta)]
    values = np.zeros((rows, steps))
    values[:, 0] = 1.0
    memory, _ = operator_rows(*gates, values, seed=2)
    grows = np.abs(memory[:, -20:]).max(1) > np.abs(memory[:, 180:200]).max(1)
    np.testing.assert_array_equal(grows, factor[:, 0] > 1)
    stable = np.asarray(analysis.is_stable(*(x[:, 0] for x in gates)))
    np.testing.assert_array_equal(stable, factor[:, 0] < 1)


@pytest.mark.parametrize(
    ("gates", "stable"),
    [
        (
            (0.25, 0.25, 2.0, 3.125),
            False,
        ),  # alpha beta eta = (1 + alpha) (1 + mu): an eigenvalue -1
        ((0.25, 0.25, 2.0, 3.1249999), True),
        ((1.0, 0.5, 0.0, 1.0), False),  # nothing forgets
        ((1.0, 0.5, 1e-9, 1.0), True),
        ((1.0, 0.0, 2.0, 1.0), False),
        ((1.0, 0.0, 1.999, 1.0), True),
        ((0.5, 1.0, 0.0, 1.0), False),
        ((0.5, 1.0, 1e-9, 1.0), True),
        ((1.0, 1.0, 0.5, 1.0), False),
        ((0.0, 0.0, 9.0, 9.0), True),  # with alpha = 0 nothing is erased either
        ((0.0, 1.0, 1.0, 1.0), False),
        ((float("nan"), 0.5, 0.5, 1.0), False),
    ],
)
def test_boundary_cases(x64, gates, stable):
    assert bool(analysis.is_stable(*gates)) == stable
    if not np.isnan(gates[0]):
        radius = np.abs(np.linalg.eigvals(numpy_matrices(*map(np.asarray, gates)))).max()
        assert (radius < 1 - 1e-12) == stable
        assert (float(analysis.spectral_radius(*gates)) < 1) == stable


def test_the_published_bounds_keep_the_load_below_a_half():
    rng = np.random.default_rng(3)
    eta, factor = rng.uniform(0, 2, COUNT), rng.uniform(0, 4, COUNT)
    cos2 = 1 / (1 + np.square(eta * factor))
    for reach in (1.0, rng.random(COUNT)):  # at the bounds, and anywhere within
        alpha, beta = cos2 * reach, (1 - cos2) * reach
        load = analysis.stability_load(alpha, 0.0, beta, eta)
        assert float(load.max()) < 0.5
    # without alpha in the erase key they do not suffice
    assert not analysis.is_stable(0.015, 0.15, 0.97, 1.9, erase=1.0)
    assert analysis.published_bounds(0.015, 0.15, 0.97, 1.9, factor=4.0, min_log_mu=-2.0).all


def test_how_far_bounds_let_a_pair_turn(x64):
    """The moduli of docs/stability.md, section 8: none is larger, and all are reached."""
    rng = np.random.default_rng(4)
    alpha = np.maximum(*rng.random((2, 300_000)))
    mu, at_the_bound = (
        alpha * rng.random(alpha.shape) ** 2,
        np.minimum(1, 2 * rng.random(alpha.shape)),
    )
    turns = {36: (0.879, 1), 60: (0.5, 1), 72: (0.342, 1), 90: (27**-0.5, 1), 120: (5 / 54, 0.618)}
    for column, most in enumerate((1 - alpha, np.ones_like(alpha))):
        gates = np.broadcast_arrays(alpha, mu, most * at_the_bound, 2.0)
        assert (np.asarray(analysis.stability_load(*gates)) <= 1).all()
        roots = np.linalg.eigvals(numpy_matrices(*gates))
        first = np.take_along_axis(roots, np.abs(roots).argmax(-1)[:, None], -1)[:, 0]
        angle, modulus = np.degrees(np.abs(np.angle(first))), np.abs(first)
        for turn, largest in {**turns, 144: (0.0666, 0.477)}.items():
            found = modulus[(angle > turn) & (angle < turn + 3)].max()
            assert 0.8 * largest[column] < found <= 1.001 * largest[column], (turn, column, found)
        negative = modulus[(np.abs(first.imag) < 1e-12) & (first.real < 0)].max()
        assert (0.9 / 8 < negative <= 1 / 8) if column == 0 else (0.97 < negative <= 1)


@pytest.mark.parametrize("min_log_mu", [None, -2.0])
def test_the_layer_keeps_to_the_published_bounds(min_log_mu):
    gates = MomentumGates(32, 64, min_log_mu=min_log_mu, tau_factor=1.0, rngs=nnx.Rngs(0))
    out = gates(3.0 * jax.random.normal(jax.random.key(1), (2, 50, 32)))
    values = jnp.exp(out.log_alpha), jnp.exp(out.log_mu), out.beta, out.eta
    factor = jnp.exp(gates.log_factor[...])
    bounds = analysis.published_bounds(
        *values, factor=factor, min_log_mu=min_log_mu, tolerance=1e-6
    )
    assert bool(bounds.all.all())
    assert bool(analysis.is_stable(*values).all())


def test_each_published_bound_is_its_own():
    def bounds(alpha=0.5, mu=0.5, beta=0.5):  # theta = 45 degrees
        out = analysis.published_bounds(alpha, mu, beta, 1.0, factor=1.0, min_log_mu=-2.0)
        return [bool(x) for x in out]

    assert bounds() == [True, True, True]
    assert bounds(beta=0.500001) == [False, True, True]
    assert bounds(beta=-0.1) == [False, True, True]
    assert bounds(alpha=0.500001) == [True, False, True]
    assert bounds(mu=0.13) == bounds(mu=1.1) == [True, True, False]
    assert bounds(mu=float("nan")) == [True, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -1.0}, "tolerance: expected a number >= 0, got -1"),
        ({"min_log_mu": 1.0}, "min_log_mu: expected a number <= 0 or None, got 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        analysis.published_bounds(0.5, 0.5, 0.5, 1.0, factor=1.0, **options)
