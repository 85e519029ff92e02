"""Gates, their bounds and the published initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MomentumDeltaNet
from mdn_jax.layers.gates import MomentumGates
from mdn_jax.layers.initializers import rate_bias
from mdn_jax.layers.projection import wide_projection
from mdn_jax.testing import relative_error
from tests.layers.helpers import TINY, assert_close, normal

HEADS = 4000


def assert_uniform(sample, low, high):
    """Kolmogorov-Smirnov: a uniform sample fails once in a thousand seeds."""
    ordered = np.sort((np.asarray(sample, np.float64) - low) / (high - low))
    assert ordered[0] >= 0
    assert ordered[-1] <= 1 + 1e-6
    ranks = np.arange(len(ordered) + 1) / len(ordered)
    distance = max(np.abs(ordered - ranks[1:]).max(), np.abs(ordered - ranks[:-1]).max())
    assert distance < 1.95 / np.sqrt(len(ordered)), distance


@pytest.fixture(scope="module")
def gates():
    return MomentumGates(16, HEADS, min_log_mu=-2.0, tau_factor=1.0, rngs=nnx.Rngs(0))


def test_published_initialisation_of_the_gates(gates):
    assert_uniform(np.exp(gates.a_log[...]), 0, 16)
    assert_uniform(np.exp(gates.mu_log[...]), 0, 16)
    assert_uniform(np.exp(gates.log_factor[...]), 0, 4)
    assert np.abs(np.corrcoef(gates.a_log[...], gates.mu_log[...])[0, 1]) < 0.05
    rate = np.logaddexp(0, np.asarray(gates.dt_bias[...], np.float64))
    assert_uniform(np.log(rate), np.log(1e-3) - 1e-3, np.log(1e-1) + 1e-3)
    np.testing.assert_array_equal(gates.dt_bias[...], gates.mu_bias[...])
    for name in "abme":
        weights = getattr(gates, f"{name}_proj")[...]
        assert abs(float(weights.std()) / 0.02 - 1) < 0.02
        assert abs(float(weights.mean())) < 3e-4


def test_published_initialisation_of_the_layer():
    config = TINY.from_dict({"hidden_size": 512, "num_heads": 2, "head_dim": 64, "conv_bias": True})
    layer = MomentumDeltaNet(config, rngs=nnx.Rngs(3))
    for path, parameter in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        values = np.asarray(parameter.get_value())
        if path[-1] == "bias":
            np.testing.assert_array_equal(values, 0)
        elif path[-1] == "scale":
            np.testing.assert_array_equal(values, 1)
        elif values.ndim == 2:
            deviations = 5 / np.sqrt(2 * values.size)
            assert abs(values.std() / 0.02 - 1) < deviations, path
    wide = MomentumDeltaNet(
        TINY.from_dict({"hidden_size": 8, "num_heads": HEADS, "head_dim": 1, "expand_v": 1}),
        rngs=nnx.Rngs(0),
    )
    assert_uniform(np.exp(wide.d_log[...]), 0, 1)


def test_the_rate_has_a_floor(monkeypatch):
    monkeypatch.setattr("mdn_jax.layers.initializers._RATE_MIN", 1e-9)
    monkeypatch.setattr("mdn_jax.layers.initializers._RATE_MAX", 1e-8)
    rate = np.logaddexp(0, np.asarray(rate_bias(jax.random.key(0), 9, jnp.float32), np.float64))
    np.testing.assert_allclose(rate, 1e-4, rtol=1e-3)


def test_without_momentum_or_bounds():
    """The paper's ablations: formulas without one factor, other gates as before."""
    plain = MomentumGates(16, 3, min_log_mu=None, tau_factor=1.0, rngs=nnx.Rngs(0))
    x = normal(0, 2, 5, 16)
    full = plain(x)
    tan = np.asarray(full.eta, np.float64) * np.exp(np.asarray(plain.log_factor[...], np.float64))
    for name, factor, bound in (
        ("log_alpha", -2 * np.log(np.cos(np.arctan(tan))), "beta"),
        ("beta", 1 / np.sin(np.arctan(tan)) ** 2, "alpha"),
    ):
        options = {"min_log_mu": None, "tau_factor": 1.0, "bound": bound}
        ablated = MomentumGates(16, 3, **options, rngs=nnx.Rngs(0))(x)
        gate = np.asarray(getattr(full, name), np.float64)
        expected = gate + factor if name == "log_alpha" else gate * factor
        assert relative_error(getattr(ablated, name), expected) <= 1e-5
        others = {n: y for n, y in ablated._asdict().items() if n != name}
        assert_close(others, {n: y for n, y in full._asdict().items() if n != name}, 0)
    alone = [
        MomentumGates(16, 3, min_log_mu=None, tau_factor=1.0, bound=bound, rngs=nnx.Rngs(0))(x)
        for bound in ("none", "beta", "alpha")
    ]
    np.testing.assert_array_equal(alone[0].log_alpha, alone[1].log_alpha)
    np.testing.assert_array_equal(alone[0].beta, alone[2].beta)
    without = MomentumGates(
        16, 3, min_log_mu=-2.0, tau_factor=1.0, use_momentum=False, rngs=nnx.Rngs(0)
    )
    assert np.exp(without(x).log_mu).max() == 0
    names = {path[0] for path, _ in nnx.to_flat_state(nnx.state(without))}
    assert names == {"a_proj", "b_proj", "e_proj", "a_log", "log_factor", "dt_bias"}


def test_bounds(gates):
    log_alpha, log_mu, beta, eta = gates(normal(0, 2, 3, 16) * 30)
    assert log_alpha.shape == (2, 3, HEADS)
    assert float(log_alpha.max()) <= 0
    assert float(log_mu.max()) <= 0
    assert float(log_mu.min()) == -2.0
    assert float(beta.min()) >= 0
    assert float((beta + jnp.exp(log_alpha)).max()) <= 1 + 1e-6
    assert float(eta.min()) >= 0
    assert float(eta.max()) <= 2


def test_no_lower_bound():
    gates = MomentumGates(16, 50, min_log_mu=None, tau_factor=1.0, rngs=nnx.Rngs(0))
    assert float(gates(normal(0, 2, 3, 16) * 30).log_mu.min()) < -2.0


def test_tau_factor_scales_the_write():
    narrow = MomentumGates(16, 8, min_log_mu=None, tau_factor=4.0, rngs=nnx.Rngs(0))
    wide = MomentumGates(16, 8, min_log_mu=None, tau_factor=1.0, rngs=nnx.Rngs(0))
    x = normal(0, 2, 3, 16)
    assert_close(jnp.arctanh(narrow(x).eta - 1), 2 * jnp.arctanh(wide(x).eta - 1), 1e-4)


def test_wide_projection_is_the_product_with_a_wide_output():
    x, kernel, cotangent = normal(0, 3, 5, 16), normal(1, 16, 4), normal(2, 3, 5, 4)
    y, pullback = jax.vjp(wide_projection, x, kernel)
    expected, expected_pullback = jax.vjp(jnp.matmul, x, kernel)
    assert_close((y, pullback(cotangent)), (expected, expected_pullback(cotangent)), 1e-6)
    low, pullback = jax.vjp(wide_projection, x.astype(jnp.bfloat16), kernel)
    assert low.dtype == jnp.float32
    exact = x.astype(jnp.bfloat16).astype(jnp.float32) @ kernel.astype(jnp.bfloat16).astype(
        jnp.float32
    )
    assert_close(low, exact, 1e-6)  # rounding the output to bfloat16 would cost 2e-3
    g_x, g_kernel = pullback(cotangent)
    assert g_x.dtype == jnp.bfloat16
    assert g_kernel.dtype == jnp.float32


def test_wide_projection_makes_no_wide_copy_of_its_input():
    x, kernel = jnp.zeros((7, 16), jnp.bfloat16), jnp.zeros((16, 4))

    def pullback(x, kernel, cotangent):
        return jax.vjp(wide_projection, x, kernel)[1](cotangent)

    text = jax.jit(pullback).lower(x, kernel, jnp.zeros((7, 4))).as_text()
    assert "tensor<7x16xbf16>" in text
    assert "tensor<7x16xf32>" not in text
