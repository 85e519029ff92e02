"""Keys that come back after others: a region of their own (docs/stability.md, section 4)."""

import jax.numpy as jnp
import numpy as np
import pytest

from mdn_jax import analysis, momentum_delta_rule

COUNT = 200_000


def edge(alpha, mu, interval):
    """The gain at which a key that comes every `interval` steps no longer is stable."""
    summed = sum(alpha ** (interval - 1 - i) * mu**i for i in range(interval))
    return (1 + alpha**interval) * (1 + mu**interval) / summed


@pytest.mark.parametrize("interval", [1, 2, 5, 30])
def test_the_region_is_that_of_the_product(interval, x64):
    rng = np.random.default_rng(interval)
    alpha, mu, eta = rng.random((3, 5000)) * np.array([[1.0], [1.0], [2.0]])
    alpha, mu = alpha**0.2, mu**0.2
    beta = rng.random(5000) * 2 * edge(alpha, mu, interval) / (alpha * eta)
    product = np.asarray(analysis.transition(alpha, mu, beta, eta))
    between = np.asarray(analysis.orthogonal_transition(alpha, mu, beta))
    for _ in range(interval - 1):
        product = between @ product
    radius = np.abs(np.linalg.eigvals(product)).max(-1)
    clear = np.abs(radius - 1) > 1e-9
    inside = alpha * beta * eta < edge(alpha, mu, interval)
    np.testing.assert_array_equal(inside[clear], radius[clear] < 1)
    assert 0.1 < inside.mean() < 0.9


@pytest.mark.parametrize(("keys", "grows"), [(1, False), (4, True)])
def test_the_operator_grows_where_keys_take_turns(keys, grows, x64):
    alpha, mu, gain, steps = 0.99, 0.9, 1.1, 400
    assert (gain > edge(alpha, mu, keys)) == grows
    key = jnp.eye(4)[jnp.arange(steps) % keys][None, :, None]
    gates = (jnp.full((1, steps, 1), x) for x in (np.log(alpha), np.log(mu), gain / alpha, 1.0))
    value = jnp.zeros((1, steps, 1, 1)).at[0, 0].set(1.0)
    options = {"scale": 1.0, "normalize_qk": False, "implementation": "scan"}
    o, _ = momentum_delta_rule(key, key, value, *gates, **options)
    size = np.abs(np.asarray(o)[0, :, 0, 0])
    assert (size[-40:].max() > size[100:140].max()) == grows


def test_the_published_bounds_allow_any_interval():
    rng = np.random.default_rng(7)
    alpha, mu = rng.random((2, COUNT)) ** rng.choice([1.0, 0.1, 0.01], (2, COUNT))
    gain = 2 * alpha * (1 - alpha)  # at both bounds, with eta = 2
    summed = np.zeros(COUNT)
    for interval in range(1, 201):
        summed = alpha * summed + mu ** (interval - 1)
        assert (gain * summed < (1 + alpha**interval) * (1 + mu**interval)).all(), interval
