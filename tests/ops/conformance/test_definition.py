"""The suite's own reference: golden vectors, central differences, a rule of another paper."""

import numpy as np
import pytest

from mdn_jax import MDNState
from mdn_jax.testing import definition, random_cotangents, random_inputs, relative_error
from tests.golden import golden_files

GOLDEN = {path.stem: path for path in golden_files("op_*.npz")}
NAMES = ("q", "k", "v", "log_alpha", "log_mu", "beta", "eta")


@pytest.mark.parametrize("case", sorted(GOLDEN))
def test_golden_vectors(case):
    """Made with the published implementation, gradients as well."""
    data = np.load(GOLDEN[case])
    inputs = {name: data[name] for name in NAMES}
    inputs["initial_state"] = MDNState(data["S0"], data["M0"])
    normalize = bool(data["use_qk_l2norm_in_kernel"])
    derived = "p" in data and (normalize or bool(data["use_p_times_alpha"]))
    if "p" in data:
        p = np.asarray(data["p"], np.float64)
        if normalize:
            p = p / np.sqrt((p * p).sum(-1, keepdims=True) + 1e-6)
        if data["use_p_times_alpha"]:
            p = np.repeat(p, data["v"].shape[2] // p.shape[2], axis=2)
            p = p * np.exp(data["log_alpha"])[..., None]
        inputs["p"] = p
    (o, state), gradients = definition(
        inputs,
        (data["ct_o"], MDNState(data["ct_S"], data["ct_M"])),
        scale=float(data["scale"]),
        normalize_qk=normalize,
    )
    errors = {
        name: relative_error(x, data[name])
        for name, x in (("o", o), ("S", state.s), ("M", state.m))
    }
    d_state = gradients.pop("initial_state")
    gradients |= {"S0": d_state.s, "M0": d_state.m}
    # p itself, and log alpha through it, come before what the definition is given
    left_out = ("p", "log_alpha") if derived else ()
    for name, gradient in gradients.items():
        if name not in left_out:
            errors[f"g_{name}"] = relative_error(gradient, data[f"g_{name}"])
    assert max(errors.values()) <= 2e-6, errors


@pytest.mark.parametrize("explicit_p", [False, True])
def test_gradients_are_central_differences(explicit_p, x64):
    inputs = random_inputs(
        seed=1,
        length=9,
        value_heads=4,
        key_dim=3,
        value_dim=2,
        regime="wide",
        dtype="float64",
        explicit_p=explicit_p,
        documents=2,
    )
    inputs |= {name: inputs[name] - 0.1 for name in ("log_alpha", "log_mu")}
    cotangents = random_cotangents(inputs)
    _, gradients = definition(inputs, cotangents)

    def loss(inputs):
        (o, state), _ = definition(inputs)
        d_o, d_state = cotangents
        pairs = ((o, d_o), (state.s, d_state.s), (state.m, d_state.m))
        return sum(float(np.sum(x * np.asarray(y))) for x, y in pairs)

    rng = np.random.default_rng(0)
    for name, x in inputs.items():
        if name == "segment_ids":
            continue
        arrays = [np.asarray(y) for y in (x if name == "initial_state" else (x,))]
        slopes = gradients[name] if name == "initial_state" else (gradients[name],)
        for i, slope in enumerate(slopes):
            direction = rng.normal(size=arrays[i].shape)
            ends = []
            for step in (1e-5, -1e-5):
                moved = [y + step * direction * (j == i) for j, y in enumerate(arrays)]
                ends.append(
                    loss(inputs | {name: MDNState(*moved) if len(moved) == 2 else moved[0]})
                )
            difference = (ends[0] - ends[1]) / 2e-5
            assert np.sum(slope * direction) == pytest.approx(difference, rel=1e-7), (name, i)


def test_without_momentum_it_is_the_gated_delta_rule(x64):
    """mu = 0, eta = 1: S = alpha S + beta k (v - alpha S^T k)^T."""
    inputs = random_inputs(seed=5, length=40, dtype="float64")
    inputs["log_mu"] = inputs["log_mu"] * 0 - np.inf
    inputs["eta"] = inputs["eta"] * 0 + 1
    (_, state), _ = definition(inputs)
    s = np.array(inputs["initial_state"].s)
    k = np.asarray(inputs["k"])
    k = k / np.sqrt((k * k).sum(-1, keepdims=True) + 1e-6)
    for t in range(40):
        s = s * np.exp(inputs["log_alpha"])[:, t, :, None, None]
        delta = np.asarray(inputs["v"])[:, t] - np.einsum("bhkv,bhk->bhv", s, k[:, t])
        write = np.einsum("bhk,bhv->bhkv", k[:, t], delta)
        s = s + np.asarray(inputs["beta"])[:, t, :, None, None] * write
    assert relative_error(state.s, s) <= 1e-13


def test_head_by_head_it_is_plain_loops(x64):
    """Grouped heads, erase keys and documents written out for one head and step at a time."""
    inputs = random_inputs(
        seed=4, length=30, value_heads=6, regime="wide", dtype="float64", explicit_p=True,
        documents=4,
    )  # fmt: skip
    (o, state), _ = definition(inputs)
    x = {name: np.asarray(y) for name, y in inputs.items() if name != "initial_state"}
    for b, h in np.ndindex(2, 6):
        s, m = (np.array(y[b, h]) for y in inputs["initial_state"])
        for t in range(30):
            if t and x["segment_ids"][b, t] != x["segment_ids"][b, t - 1]:
                s, m = np.zeros_like(s), np.zeros_like(m)
            q, k = (y / np.sqrt(y @ y + 1e-6) for y in (x[n][b, t, h // 3] for n in ("q", "k")))
            w = s.T @ x["p"][b, t, h // 3] - x["v"][b, t, h]
            m = np.exp(x["log_mu"][b, t, h]) * m + x["eta"][b, t, h] * np.outer(k, w)
            s = np.exp(x["log_alpha"][b, t, h]) * s - x["beta"][b, t, h] * m
            assert relative_error(o[b, t, h], 16**-0.5 * s.T @ q) <= 1e-12
        assert relative_error(state.s[b, h], s) <= 1e-12
        assert relative_error(state.m[b, h], m) <= 1e-12
