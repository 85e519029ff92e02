"""Mamba-3's rule: a loop with complex numbers, the scan, and the chunk algorithm."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdn_jax.ops import (
    TrapezoidalState,
    gated_linear_attention,
    trapezoidal_linear_attention,
)
from mdn_jax.ops.gated.trapezoidal import _total_angles
from mdn_jax.testing import GATE_REGIMES, relative_error, relative_errors
from tests.ops.gated.helpers import random_call as gated_call
from tests.ops.gated.loops import rotating_loop

ARRAYS = ("q", "k", "v", "log_alpha", "dt", "lam", "angles", "initial_state")
K, R = 7, 2  # channels 0 to 3 turn, 4 to 6 stay


def random_call(*, seed=0, batch=2, length=45, regime="layer", dtype="float64", documents=1):
    """Two key heads, four value heads."""
    sizes = {"heads": 2, "value_heads": 4, "key_dim": K, "value_dim": 5, "documents": documents}
    options = {"seed": seed, "batch": batch, "length": length, "regime": regime, "dtype": dtype}
    inputs = gated_call("mamba2", **sizes, **options)
    rng = np.random.default_rng(seed + 100)
    wide = inputs["log_alpha"].dtype
    inputs["dt"] = inputs.pop("beta")
    inputs["lam"] = jnp.asarray(rng.random(inputs["dt"].shape), wide)
    inputs["angles"] = jnp.asarray(rng.normal(size=(batch, length, 2, R)), wide)
    k, v = rng.normal(size=(batch, 2, K)), rng.normal(size=(batch, 4, 5))
    parts = (inputs["initial_state"], jnp.asarray(k, wide), jnp.asarray(v, wide))
    inputs["initial_state"] = TrapezoidalState(*parts)
    return inputs


@cache
def compiled(implementation, chunk_size=None):
    options = {"implementation": implementation, "chunk_size": chunk_size}
    return jax.jit(lambda inputs: trapezoidal_linear_attention(**inputs, **options))


@cache
def both(implementation, chunk_size=None):
    """Outputs, and gradients by name, of inputs and cotangents."""

    def run(inputs, cotangents):
        arrays = {name: inputs[name] for name in ARRAYS}
        fixed = {name: x for name, x in inputs.items() if name not in ARRAYS}
        rule = compiled(implementation, chunk_size)
        outputs, pull = jax.vjp(lambda arrays: rule(arrays | fixed), arrays)
        return outputs, pull(cotangents)[0]

    return jax.jit(run)


def outputs_and_gradients(inputs, implementation, chunk_size=None):
    rng = np.random.default_rng(99)
    like = (inputs["v"], inputs["initial_state"])
    cotangents = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), like)
    return both(implementation, chunk_size)(inputs, cotangents)


def test_the_scan_is_the_state_space_of_the_paper(x64):
    inputs = random_call(length=11, documents=3)
    expected = rotating_loop(**inputs)
    for implementation in ("scan", "xla"):
        actual = compiled(implementation)(inputs)
        assert max(relative_errors(actual, expected).values()) <= 1e-13


@pytest.mark.slow
def test_float64_matches_scan_in_every_regime(x64):
    for seed, regime in enumerate(GATE_REGIMES):
        inputs = random_call(seed=seed, length=150, regime=regime, documents=1 + 3 * (seed % 2))
        inputs.setdefault("segment_ids", jnp.zeros((2, 150), jnp.int32))
        expected = outputs_and_gradients(inputs, "scan")
        actual = outputs_and_gradients(inputs, "xla", 12)
        assert max(relative_errors(actual[0], expected[0]).values()) <= 1e-10
        errors = relative_errors(actual[1], expected[1])
        assert max(errors.values()) <= 1e-9, (regime, errors)


@pytest.mark.slow
def test_float32_keeps_a_share_of_almost_nothing():
    """`lam` near 0: what a step's own query sees of it is not a difference of larger numbers."""
    inputs = random_call(dtype="float32")
    inputs["lam"] = 1e-6 * inputs["lam"]
    inputs["log_alpha"] = jnp.full_like(inputs["log_alpha"], -60.0)  # nothing else is seen
    expected = outputs_and_gradients(inputs, "scan")
    actual = outputs_and_gradients(inputs, "xla")
    errors = relative_errors(actual, expected)
    seen = {name: errors[name] for name in ("0.0", "1.q", "1.k", "1.v", "1.dt", "1.lam")}
    assert max(seen.values()) <= 1e-5, seen


def test_pieces_documents_and_single_steps(x64):
    inputs = random_call(length=12, batch=1)
    packed = inputs | {"segment_ids": jnp.repeat(jnp.arange(3), 4)[None]}
    o, last = compiled("xla")(packed)
    state = inputs["initial_state"]
    for t in range(12):  # one step is one call, a document's first from zeros
        if t % 4 == 0 and t:
            state = jax.tree.map(jnp.zeros_like, state)
        one = {name: x[:, t : t + 1] for name, x in inputs.items() if name != "initial_state"}
        piece, state = compiled("xla")(one | {"initial_state": state})
        assert relative_error(piece[:, 0], o[:, t]) <= 1e-13
    assert max(relative_errors(state, last).values()) <= 1e-13


def test_without_rotation_and_step_before_it_is_mamba2(x64):
    inputs = random_call(length=12, documents=3)
    state = inputs["initial_state"]
    plain = {name: inputs[name] for name in ("q", "k", "v", "log_alpha", "segment_ids")}
    expected = gated_linear_attention(
        **plain, beta=inputs["dt"], initial_state=state.s, implementation="scan"
    )
    inputs |= {"lam": jnp.ones_like(inputs["lam"]), "angles": jnp.zeros_like(inputs["angles"])}
    o, last = compiled("xla")(inputs)
    assert max(relative_errors((o, last.s), expected).values()) <= 1e-13


def test_many_turns_lose_no_digits():
    angles = np.random.default_rng(0).uniform(0, 3, (1, 4096, 1, 1)).astype(np.float32)
    actual = np.exp(1j * np.asarray(jax.jit(_total_angles)(angles), np.float64))
    total = np.cumsum(angles.astype(np.float64), axis=1)
    assert total[0, -1] > 5000
    expected = np.exp(1j * total)
    between = [x[:, 16:] / x[:, :-16] for x in (actual, expected)]  # of what 16 steps turn
    assert np.abs(between[0] - between[1]).max() <= 1e-5
    plain = np.exp(1j * np.cumsum(angles, axis=1, dtype=np.float32).astype(np.float64))
    assert np.abs(plain[:, 16:] / plain[:, :-16] - between[1]).max() > 1e-3


def test_the_definition_of_the_library():
    ops = pytest.importorskip("jla.ops")
    inputs = random_call(length=30, dtype="float32", documents=3)
    expected = compiled("scan")(
        inputs | {"initial_state": TrapezoidalState(*map(jnp.zeros_like, inputs["initial_state"]))}
    )
    ids = np.asarray(inputs["segment_ids"])
    turns = np.exp(-1j * np.cumsum(np.asarray(inputs["angles"], np.float64), axis=1))

    def turned(x):  # to value heads, turned back by all angles so far
        x = np.array(x, np.float64)
        pairs = (x[..., : 2 * R : 2] + 1j * x[..., 1 : 2 * R : 2]) * turns
        x[..., : 2 * R : 2], x[..., 1 : 2 * R : 2] = pairs.real, pairs.imag
        return jnp.asarray(np.repeat(x, 2, axis=2), jnp.float32)

    dt, lam, g = inputs["dt"], inputs["lam"], inputs["log_alpha"]
    gates = {"g": g, "beta": (1 - lam) * dt * jnp.exp(g), "gamma": lam * dt}
    actual, _ = ops.linear_attention(
        "mamba3",
        turned(inputs["q"]),
        turned(inputs["k"]),
        inputs["v"],
        **gates,
        scale=K**-0.5,
        segment_ids=jnp.asarray(ids),
        impl="reference",
    )
    assert relative_error(actual, expected[0]) <= 1e-5


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"lam": jnp.zeros((2, 5, 2))}, ValueError, ["lam", "[B, T, HV] = [2, 5, 4]", "[2, 5, 2]"]),
        ({"dt": jnp.zeros((2, 5, 4), int)}, TypeError, ["dt", "float32", "int32"]),
        ({"angles": jnp.zeros((2, 5, 2))}, ValueError, ["angles", "[B, T, H, R]", "[2, 5, 2]"]),
        ({"angles": jnp.zeros((2, 5, 2, 4))}, ValueError, ["angles", "K / 2 = 3", "R = 4"]),
        ({"initial_state": jnp.zeros((2, 4, 7, 5))}, TypeError, ["initial_state", "(s, k, v)"]),
        ({"implementation": "mosaic_gpu"}, ValueError, ["implementation", "scan, xla"]),
    ],
)
def test_bad_input(changes, error, words):
    with pytest.raises(error) as raised:
        trapezoidal_linear_attention(**random_call(length=5, dtype="float32") | changes)
    for word in words:
        assert word in str(raised.value), str(raised.value)
    state = random_call(length=5, dtype="float32")["initial_state"]
    wrong = {"initial_state": state._replace(k=state.v)}
    with pytest.raises(ValueError, match=r"initial_state\.k: expected shape \[B, H, K\]"):
        trapezoidal_linear_attention(**random_call(length=5, dtype="float32") | wrong)
