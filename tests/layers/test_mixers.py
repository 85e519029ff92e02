"""Every mixer over the same cases: the published formulas, decoding, documents, padding."""

import dataclasses
import itertools
from functools import cache, partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax.models import Mixer
from mdn_jax.models.causal_lm import Block
from mdn_jax.testing import relative_error
from tests.layers.helpers import TINY, assert_close, call, normal
from tests.ops.gated.loops import loops, rotating_loop

ROWS, T = 3, 9  # of calls; they are of 9, 6 and 1 steps, so that few programs are compiled
MIXERS = get_args(Mixer)
MAMBA = ("mamba2", "mamba3")
every_mixer = pytest.mark.parametrize("name", MIXERS)


def config(name):
    heads = {"num_heads": 1, "num_v_heads": 4, "conv_bias": True} if name in MAMBA else {}
    return dataclasses.replace(TINY, mixer=name, use_lora_gate=name in ("kda", "gdn2"), **heads)


@cache
def make(name):
    return Block(config(name), 0, implementation="scan", rngs=nnx.Rngs(0)).mixer


@nnx.jit
def padded_call(layer, x, cache, lengths):
    return layer(x, None, cache, lengths)


def conv(x, kernel, bias):
    taps = len(kernel)
    padded = np.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
    y = sum(padded[:, tap : tap + x.shape[1]] * kernel[tap] for tap in range(taps))
    return silu(y if bias is None else y + bias)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms_norm(x, scale, eps=1e-6):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def published(name, parameters, x, *, largest_beta=1):
    """The layer of the papers in numpy, from the parameters by name."""
    P = {key: np.asarray(value, np.float64) for key, value in parameters.items()}
    heads = 1 if name == "mamba2" else 2
    q, k, v = (
        conv(x @ P[f"{n}_proj.kernel"], P[f"{n}_conv1d.kernel"], P.get(f"{n}_conv1d.bias"))
        for n in "qkv"
    )
    q, k = (y.reshape(2, T, heads, 8) for y in (q, k))
    value_heads = 4 if name == "mamba2" else 2
    v = v.reshape(2, T, value_heads, 16)
    beta = largest_beta * sigmoid(x @ P["b_proj"]) if "b_proj" in P else None
    rule = {"beta": beta, "p": None}
    if name == "gdn2":
        w = sigmoid(x @ P["w_proj"]).reshape(v.shape)
        rule = {"b": rule["beta"].reshape(k.shape), "w": w}
    if name in ("kda", "gdn2"):
        f = (x @ P["f_proj.0.kernel"] @ P["f_proj.1.kernel"] + P["dt_bias"]).reshape(q.shape)
        rule["log_alpha"] = -np.exp(P["a_log"])[:, None] * np.log1p(np.exp(f))
    else:
        rate = np.log1p(np.exp(x @ P["a_proj"] + P["dt_bias"]))
        rule["log_alpha"] = -np.exp(P["a_log"]) * rate
    if name == "comba":
        p = sigmoid(P["decay"])[:, None] * k
        q = q - P["d"][:, None] * p
        rule["p"] = p / np.sqrt((k * k).sum(-1, keepdims=True) + 1e-6)
    if name == "mamba2":
        rule["beta"], q = rate, q * np.sqrt(8)  # its scale is 1
    start = np.zeros((2, value_heads, 8, 16))
    o, _ = loops(name, q=q, k=k, v=v, initial_state=start, **rule)
    if name == "mamba2":
        o = (o + P["d"][:, None] * v).reshape(2, T, -1) * silu(x @ P["g_proj.kernel"])
        return rms_norm(o, P["o_norm.scale"]) @ P["o_proj.kernel"]
    if name in ("kda", "gdn2"):
        gate = x @ P["g_proj.layers.0.kernel"] @ P["g_proj.layers.1.kernel"]
        gate = sigmoid(gate + P["g_proj.layers.1.bias"])
    else:
        gate = (silu if name == "gdn" else sigmoid)(x @ P["g_proj.kernel"])
    o = rms_norm(o, P["o_norm.scale"]).reshape(2, T, -1) * gate
    return o @ P["o_proj.kernel"]


def mamba3(parameters, x):
    """The layer of Mamba-3's paper in numpy, from the parameters by name."""
    P = {key: np.asarray(value, np.float64) for key, value in parameters.items()}
    q, k, v = (x @ P[f"{n}_proj.kernel"] for n in "qkv")
    q, k = (
        np.repeat(rms_norm(y.reshape(2, T, 1, 8), P[f"{n}_norm.scale"]), 4, 2) + P[f"{n}_bias"]
        for n, y in (("q", q), ("k", k))
    )
    v = v.reshape(2, T, 4, 16)
    dt = np.log1p(np.exp(x @ P["dt_proj"] + P["dt_bias"]))
    rate = np.maximum(np.log1p(np.exp(x @ P["a_proj"])), 1e-4)
    angles = np.pi * np.tanh(x @ P["angle_proj"])[:, :, None] * dt[..., None]
    lam = sigmoid(x @ P["lam_proj"])
    start = (np.zeros((2, 4, 8, 16)), np.zeros((2, 4, 8)), np.zeros((2, 4, 16)))
    o, _ = rotating_loop(np.sqrt(8) * q, k, v, -rate * dt, dt, lam, angles, start)
    o = (o + P["d"][:, None] * v).reshape(2, T, -1) * silu(x @ P["g_proj.kernel"])
    return o @ P["o_proj.kernel"]


def titans(parameters, x):
    """A layer with the memory of Titans in numpy, from the parameters by name."""
    P = {key: np.asarray(value, np.float64) for key, value in parameters.items()}
    q, k, v = (conv(x @ P[f"{n}_proj.kernel"], P[f"{n}_conv1d.kernel"], None) for n in "qkv")
    q, k, v = (y.reshape(2, T, 2, -1) for y in (q, k, v))
    q, k = (y / np.sqrt((y * y).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    keep, eta = (
        np.exp(-np.exp(P[f"gates.{rate}"]) * np.log1p(np.exp(x @ P[f"gates.{n}_proj"] + P[bias])))
        for n, rate, bias in (("a", "a_log", "gates.dt_bias"), ("m", "mu_log", "gates.mu_bias"))
    )
    theta = sigmoid(x @ P["gates.e_proj"])
    o = np.zeros(v.shape)
    for b, h in np.ndindex(2, 2):
        memory, surprise = np.zeros((2, 8, 16))
        for t in range(T):
            error = memory.T @ k[b, t, h] - v[b, t, h]
            surprise = eta[b, t, h] * surprise - theta[b, t, h] * np.outer(k[b, t, h], error)
            memory = keep[b, t, h] * memory + surprise
            o[b, t, h] = memory.T @ q[b, t, h] / np.sqrt(8)
    o = rms_norm(o, P["o_norm.scale"]).reshape(2, T, -1) * sigmoid(x @ P["g_proj.kernel"])
    return o @ P["o_proj.kernel"]


@pytest.mark.parametrize("name", ["gdn", "kda", "comba", "gdn2", "mamba2", "mamba3", "titans"])
def test_the_layer_is_the_published_one(name):
    check_published(name, nnx.clone(make(name)))


def test_negative_eigenvalues_double_the_step():
    fields = dataclasses.replace(config("gdn"), allow_neg_eigval=True)
    layer = Block(fields, 0, implementation="scan", rngs=nnx.Rngs(0)).mixer
    check_published("gdn", layer, largest_beta=2)
    # of two layers only one is GDN: the other one's step stays as it is
    comba = dataclasses.replace(fields, mixer="comba", other_mixer="gdn", other_layers=(1,))
    other = Block(comba, 0, implementation="scan", rngs=nnx.Rngs(0)).mixer
    check_published("comba", other)


def check_published(name, layer, **options):
    parameters = {}
    for seed, (path, parameter) in enumerate(nnx.to_flat_state(nnx.state(layer, nnx.Param))):
        parameter[...] += 0.1 * normal(seed, *parameter.shape)  # nothing stays at 0 or 1
        parameters[".".join(map(str, path))] = parameter.get_value()
    nnx.update(layer, nnx.state(layer))
    x = normal(50, 2, T, 32)
    others = {"mamba3": mamba3, "titans": titans}
    reference = others.get(name, partial(published, name))
    expected = reference(parameters, np.asarray(x, np.float64), **options)
    assert relative_error(call(layer, x)[0], expected) <= 1e-5


@every_mixer
def test_decoding_is_the_forward_pass(name):
    layer, x = make(name), normal(1, ROWS, T, 32)
    y, last = call(layer, x, None, layer.init_cache(ROWS))
    outputs, cache = call(layer, x[:, :6], None, layer.init_cache(ROWS))
    outputs = [outputs]
    for t in range(6, T):
        one, cache = call(layer, x[:, t : t + 1], None, cache)
        outputs.append(one)
    assert_close((jnp.concatenate(outputs, axis=1), cache), (y, last))


@every_mixer
def test_packed_documents_are_separate_ones(name):
    layer, x = make(name), normal(2, ROWS, T, 32)
    cuts = [0, 1, 7, 8, T]  # shorter and longer than the taps
    ids = np.repeat(np.arange(4, dtype=np.int32), np.diff(cuts))
    y, cache = call(layer, x, jnp.asarray([ids] * ROWS), layer.init_cache(ROWS))
    for start, stop in itertools.pairwise(cuts):
        alone, last = call(layer, x[:, start:stop], None, layer.init_cache(ROWS))
        assert_close(y[:, start:stop], alone)
    if name != "attention":  # whose cache has empty entries for the documents before
        assert_close(cache, last)


@every_mixer
def test_padding_leaves_no_trace(name):
    layer, x = make(name), normal(3, ROWS, T, 32)
    lengths = jnp.asarray([0, 6, T])
    padded = jnp.where(jnp.arange(T)[:, None] < lengths[:, None, None], x, 50.0)
    _, before = call(layer, normal(4, ROWS, 6, 32), None, layer.init_cache(ROWS))
    y, cache = padded_call(layer, padded, before, lengths)
    alone, last = call(layer, x[:, :6], None, before)  # rows are independent
    assert_close(y[1, :6], alone[1])
    if name != "attention":
        own = jax.tree.map(lambda z: z[1], (cache, last))
        assert_close(*own)
        first = jax.tree.map(lambda z: z[:1], (cache, before))
        assert_close(first[0], first[1], 0)


@every_mixer
def test_every_parameter_has_a_gradient(name):
    layer = make(name)

    @nnx.jit
    def gradient(layer, x):
        return nnx.grad(lambda layer, x: (layer(x)[0] ** 2).sum())(layer, x)

    for path, parameter in nnx.to_flat_state(gradient(layer, normal(5, 2, T, 32))):
        assert jnp.isfinite(parameter.get_value()).all(), path
        assert jnp.abs(parameter.get_value()).max() > 0, path


def test_published_initialisation():
    sizes = {"hidden_size": 64, "num_heads": 64, "head_dim": 4, "initializer_range": 0.02}
    for name in ("gdn", "kda", "comba", "gdn2", "mamba2", "mamba3"):
        heads = {"num_heads": 1, "num_v_heads": 64} if name in MAMBA else {}
        whole = dataclasses.replace(config(name), **(sizes | heads))
        layer = Block(whole, 0, rngs=nnx.Rngs(1)).mixer
        if name != "mamba3":  # whose rate has no parameter of its own
            rates = np.exp(layer.a_log[...])
            lowest = 1 if name in ("kda", "gdn2", "mamba2") else 0
            assert lowest < rates.min() < 4 < 12 < rates.max() <= 16
        steps = np.log1p(np.exp(np.asarray(layer.dt_bias[...], np.float64)))
        assert 9e-4 < steps.min() < 5e-3 < 2e-2 < steps.max() < 0.11
        assert layer.dt_bias.shape == ((256,) if name in ("kda", "gdn2") else (64,))
        assert np.std(layer.v_proj.kernel[...]) == pytest.approx(0.02, rel=0.05)
        if name in ("comba", *MAMBA):
            np.testing.assert_array_equal(layer.d[...], 1)
        if name == "mamba3":
            np.testing.assert_array_equal(layer.q_bias[...], 1)
            np.testing.assert_array_equal(layer.k_bias[...], 1)
        bound = (layer.o_proj.kernel.shape[0] * whole.num_hidden_layers) ** -0.5
        uniform = name in MAMBA
        assert (np.abs(layer.o_proj.kernel[...]).max() <= bound) == uniform
        spread = bound / np.sqrt(3) if uniform else 0.02
        assert np.std(layer.o_proj.kernel[...]) == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize("name", ["gdn", "kda", "comba", "gdn2", "mamba2", "mamba3"])
def test_a_cache_of_another_layer(name):
    layer, x = make(name), normal(0, 2, T, 32)
    with pytest.raises(TypeError, match=r"cache: expected (State|Mamba3)Cache"):
        layer(x, None, make("mdn").init_cache(2))
    with pytest.raises(ValueError, match=r"cache\.state(\.s)?: expected shape \[2, "):
        layer(x, None, layer.init_cache(3))
