"""The scan against a program that shares nothing with it: loops over numpy arrays."""

import numpy as np
import pytest

from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.testing import random_inputs, relative_error


def recurrence(q, k, v, log_alpha, log_mu, beta, eta, initial_state, p=None, segment_ids=None):
    q, k, v = (np.asarray(x) for x in (q, k, v))
    batch, length, heads, key_dim = q.shape
    value_heads = v.shape[2]
    o = np.zeros(v.shape)
    final_s, final_m = (np.array(x) for x in initial_state)
    for b in range(batch):
        for h in range(value_heads):
            s, m = final_s[b, h], final_m[b, h]
            key_head = h // (value_heads // heads)
            for t in range(length):
                if segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]:
                    s, m = np.zeros_like(s), np.zeros_like(m)
                unit = [x / np.sqrt(x @ x + 1e-6) for x in (q[b, t, key_head], k[b, t, key_head])]
                alpha, mu = np.exp(log_alpha[b, t, h]), np.exp(log_mu[b, t, h])
                erase = alpha * unit[1] if p is None else p[b, t, key_head]
                w = s.T @ erase - v[b, t, h]
                m = mu * m + eta[b, t, h] * np.outer(unit[1], w)
                s = alpha * s - beta[b, t, h] * m
                o[b, t, h] = key_dim**-0.5 * s.T @ unit[0]
            final_s[b, h], final_m[b, h] = s, m
    return o, MDNState(final_s, final_m)


@pytest.mark.parametrize("implementation", ["scan", "xla"])
@pytest.mark.parametrize("explicit_p", [False, True])
@pytest.mark.parametrize("documents", [1, 4])
def test_matches_plain_loops(implementation, explicit_p, documents, x64):
    inputs = random_inputs(
        seed=4,
        length=70,
        value_heads=6,
        regime="wide",
        dtype="float64",
        explicit_p=explicit_p,
        documents=documents,
    )
    o, state = momentum_delta_rule(**inputs, implementation=implementation)
    expected_o, expected_state = recurrence(**inputs)
    assert relative_error(o, expected_o) <= 1e-13
    assert relative_error(state.s, expected_state.s) <= 1e-13
    assert relative_error(state.m, expected_state.m) <= 1e-13


@pytest.mark.parametrize("implementation", ["scan", "xla"])
def test_without_momentum_it_is_the_gated_delta_rule(implementation, x64):
    """mu = 0, eta = 1: S = alpha S + beta k (v - alpha S^T k)^T."""
    inputs = random_inputs(seed=5, length=40, dtype="float64")
    inputs["log_mu"] = inputs["log_mu"] * 0 - np.inf
    inputs["eta"] = inputs["eta"] * 0 + 1
    o, state = momentum_delta_rule(**inputs, implementation=implementation)
    s = np.array(inputs["initial_state"].s)
    k = np.asarray(inputs["k"])
    k = k / np.sqrt((k * k).sum(-1, keepdims=True) + 1e-6)
    for t in range(40):
        s = s * np.exp(inputs["log_alpha"])[:, t, :, None, None]
        delta = np.asarray(inputs["v"])[:, t] - np.einsum("bhkv,bhk->bhv", s, k[:, t])
        write = np.einsum("bhk,bhv->bhkv", k[:, t], delta)
        s = s + np.asarray(inputs["beta"])[:, t, :, None, None] * write
    assert relative_error(state.s, s) <= 1e-13
    assert o.shape == inputs["v"].shape
