"""`bound="stable"`: inside the region whatever the weights, and where it starts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MomentumDeltaNet, analysis, momentum_delta_rule
from mdn_jax.interop import official_state_dict
from mdn_jax.layers.gates import MomentumGates
from mdn_jax.layers.stable_gates import LEAST_DECAY, largest_beta, stability_margin
from tests.layers.helpers import TINY, assert_close, call, normal

WIDTH, HEADS = 16, 40


def make(bound="stable", **options):
    fields = {"min_log_mu": -2.0, "tau_factor": 1.0} | options
    return MomentumGates(WIDTH, HEADS, bound=bound, **fields, rngs=nnx.Rngs(0))


@nnx.jit
def gates_of(gates, x):
    return gates(x)


def extreme(gates, seed):
    """Every parameter far from its start: saturated, tiny, huge, of either sign."""
    rng = np.random.default_rng(seed)
    for _, parameter in nnx.to_flat_state(nnx.state(gates, nnx.Param)):
        sizes = 10.0 ** rng.uniform(-3, 3, parameter.shape)
        parameter[...] = jnp.asarray(sizes * rng.choice([-1, 1], parameter.shape), jnp.float32)
    for name in ("a_log", "mu_log"):
        logs = getattr(gates, name)
        logs[...] = jnp.asarray(rng.uniform(-40, 6, logs.shape), jnp.float32)
    return gates


@pytest.mark.parametrize("options", [{}, {"erase_by_alpha": False}, {"min_log_mu": None}])
def test_the_spectral_radius_is_at_most_one(options):
    margin = stability_margin(jnp.float32)
    loads, angles = [], []
    for seed in range(4):
        gates = make(**options)
        if seed:
            extreme(gates, seed)
        out = gates_of(gates, normal(seed, 2, 500, WIDTH) * [1, 0, 1, 100][seed])
        assert bool(jnp.isfinite(jnp.stack([out.beta, out.eta])).all())
        with jax.enable_x64(True):
            alpha, mu = (np.exp(np.asarray(x, np.float64)) for x in out[:2])
            beta, eta = (np.asarray(x, np.float64) for x in out[2:])
            assert beta.min() >= 0
            assert beta.max() <= 2
            assert mu.max() < 1
            erase = None if gates.erase_by_alpha else 1.0
            values = alpha, mu, beta, eta
            radius = np.asarray(analysis.spectral_radius(*values, erase=erase))
            load = np.asarray(analysis.stability_load(*values, erase=erase))
            loads.append(load.max())
            assert radius.max() <= 1 + 1e-15
            # on the circle only where nothing is erased or forgotten
            gain = beta * eta * (alpha if erase is None else erase)
            assert ((1 - alpha < 1e-9) & (gain < 1e-9))[radius > 1 - 1e-12].all()
            first = np.asarray(analysis.eigenvalues(*values, erase=erase))[..., 0]
            angles.append(np.angle(first)[np.abs(first) > 0.99])
    assert 1 - 2 * margin < max(loads) < 1 - margin / 2  # up to the edge, not over it
    angles = np.concatenate(angles)
    assert (angles == np.pi).any()  # negative
    assert ((angles > 1) & (angles < 3)).any()  # complex, more than a sixth of a turn a step


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_margin_is_more_than_rounding_of_keys_adds(dtype):
    """The largest beta with a key that rounding made longer, in float64."""
    longest = (1 + float(jnp.finfo(dtype).eps) / 2) ** 2  # the key and the erase key
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        alpha, mu, eta = (jnp.asarray(rng.random(10_000) ** 0.2) for _ in range(3))
        beta = largest_beta(alpha, mu, 2 * eta, alpha, stability_margin(dtype))
        load = analysis.stability_load(alpha, mu, beta, 2 * eta, erase=alpha * longest)
        largest = float(load.max())
    assert 0.98 < largest < 1


def test_a_repeated_key_does_not_grow():
    """The operator itself: 300 steps of one token, gates at the edge, the memory stays bounded."""
    config = dataclasses.replace(
        TINY, bound="stable", use_p_times_alpha=False, num_v_heads=4, min_log_mu=None
    )
    layer = MomentumDeltaNet(config, implementation="scan", rngs=nnx.Rngs(0))
    gates = layer.gates
    x = jnp.ones((1, 300, TINY.hidden_size))
    for name, size in (("a", -1.0), ("b", 1.0), ("m", 1.0), ("e", 1.0)):
        getattr(gates, f"{name}_proj")[...] = jnp.full((TINY.hidden_size, 4), size)
    out = gates_of(gates, x)
    load = analysis.stability_load(*map(jnp.exp, out[:2]), out.beta, out.eta, erase=1.0)
    assert float(load.min()) > 0.999
    assert largest_growth(layer, x) < 4
    gates.margin = -0.1  # a tenth beyond the edge
    assert largest_growth(layer, x) > 100


def largest_growth(layer, x):
    """Of the states, from half way to the end."""
    _, half = call(layer, x[:, :150])
    _, whole = call(layer, x)
    pairs = zip(half.state, whole.state, strict=True)
    return max(float(jnp.abs(after).max() / jnp.abs(before).max()) for before, after in pairs)


@pytest.mark.parametrize("options", [{}, {"erase_by_alpha": False}, {"use_momentum": False}])
def test_a_correction_adds_up_to_one_at_the_start(options):
    x = jnp.zeros((1, 1, WIDTH))
    stable, free = (gates_of(make(bound, **options), x) for bound in ("stable", "none"))
    np.testing.assert_array_equal(stable.log_alpha, free.log_alpha)
    np.testing.assert_array_equal(stable.eta, 1)
    np.testing.assert_allclose(stable.log_mu, free.log_mu - LEAST_DECAY, rtol=1e-6)
    np.testing.assert_allclose(stable.beta, -jnp.expm1(stable.log_mu), rtol=1e-4)


def test_many_keys_do_not_grow_at_the_start():
    """States after 500 random keys are about those of the published bounds; a larger beta grows."""
    arrays = [normal(seed, 1, 500, HEADS, 16) for seed in range(3)]
    x = normal(3, 1, 500, WIDTH)

    @jax.jit
    def norms(gates):
        _, state = momentum_delta_rule(*arrays, *gates, implementation="xla")
        return jnp.sqrt(jnp.sum(state.s**2, axis=(0, 2, 3)))

    published = norms(gates_of(make("published"), x))
    gates = make()
    assert float(norms(gates_of(gates, x)).max()) < 3 * float(published.max())
    gates.b_bias[...] = jnp.zeros_like(gates.b_bias[...])  # half of the largest beta
    for wild in (gates, make("none")):
        assert not float(norms(gates_of(wild, x)).max()) < 1e6 * float(published.max())


def test_as_many_parameters_as_published():
    shapes = [
        sorted(x.get_value().shape for _, x in nnx.to_flat_state(nnx.state(make(bound))))
        for bound in ("stable", "published")
    ]
    assert shapes[0] == shapes[1]


def test_gradients_are_finite():
    @nnx.jit
    def gradient(gates, x):
        def loss(gates, x):
            return sum(jnp.sum(jnp.sin(y)) for y in gates(x))

        return nnx.grad(loss, argnums=(0, 1))(gates, x)

    for size in (0.0, 1.0, 100.0):
        by_parameter, by_x = gradient(make(), normal(0, 2, 50, WIDTH) * size)
        for path, x in nnx.to_flat_state(by_parameter):
            assert jnp.isfinite(x.get_value()).all(), (path, size)
        assert jnp.isfinite(by_x).all()
    assert all(jnp.any(x.get_value() != 0) for _, x in nnx.to_flat_state(by_parameter))


def test_the_chunk_algorithm_is_the_scan_and_a_token_at_a_time():
    config = dataclasses.replace(TINY, bound="stable", num_v_heads=4)
    layers = []
    for implementation in ("scan", "xla"):
        layer = MomentumDeltaNet(config, implementation=implementation, rngs=nnx.Rngs(0))
        for name in "be":  # near the edge
            kernel = getattr(layer.gates, f"{name}_proj")
            kernel[...] = 10 * kernel[...]
        layers.append(layer)
    x = normal(1, 1, 70, TINY.hidden_size)
    expected, last = call(layers[0], x)
    assert_close(call(layers[1], x), (expected, last), 1e-4)
    outputs, cache = [], layers[1].init_cache(1)
    for t in range(12):
        y, cache = call(layers[1], x[:, t : t + 1], None, cache)
        outputs.append(y)
    assert_close(jnp.concatenate(outputs, axis=1), expected[:, :12], 1e-4)


def test_the_output_correction_is_of_the_query_alone():
    options = {"bound": "stable", "use_output_correction": True}
    layer = MomentumDeltaNet(dataclasses.replace(TINY, **options), rngs=nnx.Rngs(0))
    corrected, cache = call(layer, normal(2, 1, 20, TINY.hidden_size))
    layer.d_log = None
    plain, same = call(layer, normal(2, 1, 20, TINY.hidden_size))
    assert_close(same.state, cache.state, 1e-6)
    assert float(jnp.abs(corrected - plain).max()) > 1e-3


def test_a_layer_of_another_kind_is_not_exported():
    for bound in ("stable", "none"):
        layer = MomentumDeltaNet(dataclasses.replace(TINY, bound=bound), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=f"bound: expected 'published' .* got '{bound}'"):
            official_state_dict(layer)
