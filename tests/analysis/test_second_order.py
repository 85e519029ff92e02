"""Each formula against numpy's eigenvalues, and against the operator itself, in float64."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from mdn_jax import analysis
from tests.analysis.helpers import numpy_matrices, operator_rows, random_gates

pytestmark = pytest.mark.usefixtures("x64")
COUNT = 20_000


@pytest.fixture(scope="module", params=["alpha k", "k", "any"])
def setting(request):
    """Gates, and the erase key times the key: None, 1, or anything of either sign."""
    gates = random_gates(0, COUNT)
    erase = {"alpha k": None, "k": np.ones(COUNT)}.get(
        request.param, np.random.default_rng(1).uniform(-1, 1, COUNT)
    )
    return gates, erase


def test_the_matrix_is_the_recurrence(setting):
    gates, erase = setting
    actual = analysis.transition(*gates, erase=erase)
    assert actual.dtype == jnp.float64
    np.testing.assert_allclose(actual, numpy_matrices(*gates, erase), rtol=0, atol=1e-15)


def test_eigenvalues_are_those_of_the_matrix(setting):
    gates, erase = setting
    actual = np.asarray(analysis.eigenvalues(*gates, erase=erase))
    expected = np.linalg.eigvals(numpy_matrices(*gates, erase))
    # a pair near a double eigenvalue is known to sqrt(eps) only: compare what is well conditioned
    np.testing.assert_allclose(actual.sum(-1), expected.sum(-1), rtol=0, atol=1e-13)
    np.testing.assert_allclose(actual.prod(-1), expected.prod(-1), rtol=0, atol=1e-13)
    ordered = np.take_along_axis(
        expected, np.lexsort((-expected.imag, -np.abs(expected)), axis=-1), axis=-1
    )
    apart = np.abs(expected[:, 0] - expected[:, 1]) > 1e-3
    tied = np.abs(np.abs(expected[:, 0]) - np.abs(expected[:, 1])) < 1e-12
    clear = apart & (~tied | (expected.imag[:, 0] != 0))
    assert clear.mean() > 0.9
    np.testing.assert_allclose(actual[clear], ordered[clear], rtol=0, atol=1e-12)
    assert (np.abs(actual[:, 0]) >= np.abs(actual[:, 1]) * (1 - 1e-15)).all()


def test_complex_exactly_where_numpy_says(setting):
    gates, erase = setting
    values = np.linalg.eigvals(numpy_matrices(*gates, erase))
    actual = np.asarray(analysis.is_oscillating(*gates, erase=erase))
    clear = np.abs(values[:, 0] - values[:, 1]) > 1e-6  # numpy cannot tell a double one
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(actual[clear], values.imag[clear, 0] != 0)
    assert 0.05 < actual.mean() < 0.95


def test_the_complex_region_is_an_interval_of_the_gain():
    alpha, mu, beta, eta = random_gates(2, COUNT)
    low, high = map(np.asarray, analysis.complex_region(alpha, mu))
    gain = beta * eta * alpha
    np.testing.assert_array_equal(
        analysis.is_oscillating(alpha, mu, beta, eta), (low < gain) & (gain < high)
    )
    for gain, inside in ((low * (1 - 1e-9), False), (high * (1 + 1e-9), False)):
        np.testing.assert_array_equal(
            analysis.is_oscillating(alpha, mu, gain, 1.0, erase=1.0), inside
        )
    middle = np.asarray(analysis.is_oscillating(alpha, mu, (low + high) / 2, 1.0, erase=1.0))
    np.testing.assert_array_equal(middle, alpha * mu > 0)


def test_spectral_radius(setting):
    gates, erase = setting
    expected = np.abs(np.linalg.eigvals(numpy_matrices(*gates, erase))).max(-1)
    actual = np.asarray(analysis.spectral_radius(*gates, erase=erase))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-8)  # sqrt(eps) at double ones
    assert np.quantile(np.abs(actual - expected), 0.99) < 1e-13
    oscillating = np.asarray(analysis.is_oscillating(*gates, erase=erase))
    root = np.sqrt(gates[0] * gates[1])
    np.testing.assert_allclose(actual[oscillating], root[oscillating], rtol=1e-15)


@pytest.mark.slow
def test_impulse_response_is_that_of_the_scan():
    steps, rows = 24, 10_000
    gates = [np.repeat(x[:, None], steps, axis=1) for x in random_gates(3, rows)]
    predicted = np.asarray(analysis.impulse_response(*gates))
    values = np.zeros((rows, steps))
    values[:, 0] = 1.0
    memory, momentum = operator_rows(*gates, values, seed=4)
    scale = np.abs(predicted).max(axis=(1, 2), keepdims=True) + 1.0
    np.testing.assert_allclose(
        memory / scale[..., 0], predicted[..., 0] / scale[..., 0], atol=1e-13
    )
    np.testing.assert_allclose(
        momentum / scale[:, 0, 0], predicted[:, -1, 1] / scale[:, 0, 0], atol=1e-13
    )


@pytest.mark.parametrize("erase", [None, 1.0, 0.3])
def test_impulse_response_with_changing_gates_and_erase_key(erase):
    steps, rows = 16, 500
    gates = random_gates(5, (rows, steps))
    predicted = np.asarray(analysis.impulse_response(*gates, erase=erase))
    values = np.zeros((rows, steps))
    values[:, 0] = 1.0
    memory, _ = operator_rows(*gates, values, seed=6, erase=erase)
    np.testing.assert_allclose(memory, predicted[..., 0], rtol=1e-10, atol=1e-12)


def test_an_oscillation_has_the_predicted_period_and_decay():
    alpha, mu, beta, eta = 0.999, 0.98, 0.01, 1.0
    assert analysis.is_oscillating(alpha, mu, beta, eta)
    steps = 600
    gates = [np.full((1, steps), x) for x in (alpha, mu, beta, eta)]
    values = np.zeros((1, steps))
    values[:, 0] = 1.0
    memory = operator_rows(*gates, values, seed=7)[0][0]
    t = np.flatnonzero((memory[:-1] < 0) & (memory[1:] >= 0))  # upward crossings of zero
    crossings = t + memory[t] / (memory[t] - memory[t + 1])
    period = float(analysis.period(alpha, mu, beta, eta))
    np.testing.assert_allclose(np.diff(crossings), period, rtol=1e-3)
    peaks = [memory[int(a) : int(b)].max() for a, b in itertools.pairwise(crossings)]
    halves = period / float(analysis.half_life(analysis.spectral_radius(alpha, mu, beta, eta)))
    np.testing.assert_allclose(np.diff(np.log2(peaks)), -halves, rtol=0.05)
    rate, angle = -np.log(np.sqrt(alpha * mu)), 2 * np.pi / period
    ratio = float(analysis.damping_ratio(alpha, mu, beta, eta))
    np.testing.assert_allclose(ratio, rate / np.hypot(rate, angle), rtol=1e-12)


def test_orthogonal_directions_decay_and_take_up_the_momentum():
    steps, rows = 12, 200
    gates = random_gates(8, (rows, steps))
    s, m = np.random.default_rng(9).normal(size=(2, rows))
    memory, momentum = operator_rows(*gates, np.ones((rows, steps)), seed=10, orthogonal=(s, m))
    state = np.stack([s, m], axis=-1)
    matrices = np.asarray(analysis.orthogonal_transition(*gates[:3]))
    for t in range(steps):
        state = np.einsum("bij,bj->bi", matrices[:, t], state)
        np.testing.assert_allclose(memory[:, t], state[:, 0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(momentum, state[:, 1], rtol=1e-10, atol=1e-12)


def test_any_erase_key_gives_the_eigenvalues_of_the_whole_state():
    """[S; M] has 2K rows: along the key those of the 2 by 2 system, else alpha and mu."""
    rng = np.random.default_rng(11)
    K = 4
    for alpha, mu, beta, eta in np.stack(random_gates(12, 200), axis=-1):
        k, p = rng.normal(size=(2, K))
        k /= np.linalg.norm(k)
        write = np.outer(k, p)
        whole = np.block(
            [
                [alpha * np.eye(K) - beta * eta * write, -beta * mu * np.eye(K)],
                [eta * write, mu * np.eye(K)],
            ]
        )
        pair = np.asarray(analysis.eigenvalues(alpha, mu, beta, eta, erase=p @ k))
        expected = np.concatenate([pair, np.repeat([alpha, mu], K - 1)])
        # the characteristic polynomials, as their roots are defective where alpha = mu
        np.testing.assert_allclose(np.poly(whole), np.poly(expected).real, atol=1e-11)


def test_boundary_cases_are_exact():
    both = analysis.eigenvalues
    # a double eigenvalue at either end of the complex region: alpha = 1/4, mu = 1/16, all dyadic
    for gain, root in ((1 / 16, 1 / 8), (9 / 16, -1 / 8)):
        assert both(0.25, 0.0625, gain, 1.0, erase=1.0).tolist() == [root, root]
        assert not analysis.is_oscillating(0.25, 0.0625, gain, 1.0, erase=1.0)
        assert analysis.spectral_radius(0.25, 0.0625, gain, 1.0, erase=1.0) == 1 / 8
        for inward in (gain + 1e-15, gain - 1e-15):
            inside = 1 / 16 < inward < 9 / 16
            assert analysis.is_oscillating(0.25, 0.0625, inward, 1.0, erase=1.0) == inside
    # beta = 0: nothing is written into the memory
    assert both(0.5, 0.25, 0.0, 1.5).tolist() == [0.5, 0.25]
    assert both(0.25, 0.5, 0.0, 1.5).tolist() == [0.5, 0.25]
    assert both(0.25, 0.25, 0.0, 1.5).tolist() == [0.25, 0.25]
    # mu = 0: the gated delta rule
    assert both(0.75, 0.0, 0.5, 1.0).tolist() == [0.375, 0.0]
    assert both(0.5, 0.0, 2.0, 1.5).tolist() == [-1.0, 0.0]
    assert both(0.75, 0.0, 0.5, 2.0).tolist() == [0.0, 0.0]
    # alpha = 1: without an erase an eigenvalue of 1, with it a pair of modulus sqrt(mu)
    assert analysis.spectral_radius(1.0, 0.25, 0.0, 1.0) == 1.0
    assert analysis.spectral_radius(1.0, 0.25, 1.0, 1.0) == 0.5
    assert both(1.0, 1.0, 2.0, 1.0).tolist() == [1j, -1j]
    assert analysis.period(1.0, 1.0, 2.0, 1.0) == 4.0
    assert analysis.damping_ratio(1.0, 1.0, 2.0, 1.0) == 0.0
    assert both(0.0, 0.0, 1.0, 1.0).tolist() == [0.0, 0.0]


def test_periods_half_lives_and_damping_at_their_ends():
    assert analysis.period(0.5, 0.25, 0.0, 1.0) == np.inf
    assert analysis.period(0.5, 0.0, 2.0, 1.5) == 2.0
    assert analysis.period(0.0, 0.0, 0.0, 0.0) == np.inf
    np.testing.assert_array_equal(
        analysis.half_life([0.0, 0.5, 0.25, 1.0, 1.5]), [0, 1, 0.5, np.inf, np.inf]
    )
    assert analysis.damping_ratio(0.5, 0.25, 0.0, 1.0) == 1.0
    assert analysis.damping_ratio(0.0, 0.0, 0.0, 0.0) == 1.0
    assert analysis.damping_ratio(1.0, 0.0, 0.0, 0.0) == 1.0
