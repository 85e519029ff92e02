"""The definition in plain numpy and float64: values, and gradients derived by hand.

It shares nothing with the library, not even JAX: a loop over the steps, then one back. Slow and
hungry (both states of every step are kept): for small inputs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdn_jax.ops.state import MDNState

F64 = NDArray[np.float64]
EPSILON = 1e-6
"""In the norm of q and k."""


def definition(
    inputs: Mapping[str, Any], cotangents: tuple[Any, MDNState] | None = None, **options: Any
) -> tuple[tuple[F64, MDNState], dict[str, Any]]:
    """Outputs, final state and gradients of the momentum delta rule.

    Args:
      inputs: array arguments of `momentum_delta_rule`, of any float dtype.
      cotangents: of the outputs and the final state; None: no gradients.
      options: `scale` and `normalize_qk`, as there.

    Returns:
      `((o, state), gradients by name)`, all float64; without cotangents there are no gradients.
    """
    run = _Recurrence(inputs, **options)
    outputs = run.forward()
    return outputs, {} if cotangents is None else run.backward(*cotangents)


class _Recurrence:
    """One call. Arrays are `[T, B, HV, ...]`, with key heads repeated for their value heads."""

    def __init__(
        self, inputs: Mapping[str, Any], *, scale: float | None = None, normalize_qk: bool = True
    ):
        x = {
            name: np.asarray(y, np.float64)
            for name, y in inputs.items()
            if name not in ("initial_state", "segment_ids") and y is not None
        }
        self.heads = {name: y.shape[2] for name, y in x.items()}
        self.value_heads = x["v"].shape[2]
        key_dim, value_dim = x["q"].shape[-1], x["v"].shape[-1]
        batch, length = x["v"].shape[:2]
        self.scale = key_dim**-0.5 if scale is None else scale
        self.normalize = normalize_qk
        self.given = {name: self._per_value_head(y) for name, y in x.items()}
        self.length = length
        fresh = np.zeros((length, batch), bool)
        ids = inputs.get("segment_ids")
        if ids is not None:
            fresh[1:] = (np.asarray(ids)[:, 1:] != np.asarray(ids)[:, :-1]).T
        self.keep = ~fresh[:, :, None, None, None]
        state = inputs.get("initial_state")
        shape = (batch, self.value_heads, key_dim, value_dim)
        self.entering = state is not None
        s, m = (np.zeros(shape), np.zeros(shape)) if state is None else state
        self.s, self.m = [np.asarray(s, np.float64)], [np.asarray(m, np.float64)]
        self.alpha, self.mu = np.exp(self.given["log_alpha"]), np.exp(self.given["log_mu"])
        self.q, self.k = (self._unit(self.given[name]) for name in ("q", "k"))
        self.erase = self.given.get("p", self.alpha[..., None] * self.k)
        self.w: list[F64] = []

    def _per_value_head(self, x: F64) -> F64:
        """`[B, T, H, ...] -> [T, B, HV, ...]`."""
        return np.moveaxis(np.repeat(x, self.value_heads // x.shape[2], axis=2), 1, 0)

    def _per_own_head(self, gradient: F64, name: str) -> F64:
        """`[T, B, HV, ...] -> [B, T, H, ...]`: the sum over the value heads that share one."""
        x = np.moveaxis(gradient, 0, 1)
        heads = self.heads[name]
        return x.reshape(*x.shape[:2], heads, -1, *x.shape[3:]).sum(axis=3)

    def _unit(self, x: F64) -> F64:
        return x / _norm(x) if self.normalize else x

    def _unit_gradient(self, x: F64, gradient: F64) -> F64:
        if not self.normalize:
            return gradient
        norm = _norm(x)
        unit = x / norm
        return (gradient - unit * (unit * gradient).sum(-1, keepdims=True)) / norm

    def forward(self) -> tuple[F64, MDNState]:
        """Fills the lists of states and errors; outputs and final state."""
        v, beta, eta = (self.given[name] for name in ("v", "beta", "eta"))
        o = np.zeros(v.shape)
        for t in range(self.length):
            s, m = self.s[-1] * self.keep[t], self.m[-1] * self.keep[t]
            w = np.einsum("bhkv,bhk->bhv", s, self.erase[t]) - v[t]
            write = self.k[t][..., None] * w[..., None, :]
            m = self.mu[t][..., None, None] * m + eta[t][..., None, None] * write
            s = self.alpha[t][..., None, None] * s - beta[t][..., None, None] * m
            o[t] = self.scale * np.einsum("bhkv,bhk->bhv", s, self.q[t])
            self.s.append(s)
            self.m.append(m)
            self.w.append(w)
        return np.moveaxis(o, 0, 1), MDNState(self.s[-1], self.m[-1])  # type: ignore[arg-type]

    def backward(self, d_o: Any, d_state: MDNState) -> dict[str, Any]:
        """Gradients of every array that was given."""
        beta, eta = self.given["beta"], self.given["eta"]
        d_o = np.moveaxis(np.asarray(d_o, np.float64), 1, 0)
        d_s, d_m = (np.asarray(x, np.float64) for x in d_state)
        d = {name: np.zeros(x.shape) for name, x in self.given.items()}
        d_alpha, d_mu = np.zeros(beta.shape), np.zeros(beta.shape)
        d_q, d_k, d_erase = (np.zeros(self.k.shape) for _ in range(3))
        for t in reversed(range(self.length)):
            s, m = self.s[t] * self.keep[t], self.m[t] * self.keep[t]
            d_q[t] = self.scale * np.einsum("bhkv,bhv->bhk", self.s[t + 1], d_o[t])
            d_s = d_s + self.scale * self.q[t][..., None] * d_o[t][..., None, :]
            # S = alpha S' - beta M
            d_alpha[t] = (d_s * s).sum((-2, -1))
            d["beta"][t] = -(d_s * self.m[t + 1]).sum((-2, -1))
            d_m = d_m - beta[t][..., None, None] * d_s
            d_s = self.alpha[t][..., None, None] * d_s
            # M = mu M' + eta k w^T
            d_mu[t] = (d_m * m).sum((-2, -1))
            read = np.einsum("bhkv,bhk->bhv", d_m, self.k[t])
            d["eta"][t] = (read * self.w[t]).sum(-1)
            d_k[t] = eta[t][..., None] * np.einsum("bhkv,bhv->bhk", d_m, self.w[t])
            d_w = eta[t][..., None] * read
            d_m = self.mu[t][..., None, None] * d_m
            # w = S'^T p - v
            d_erase[t] = np.einsum("bhkv,bhv->bhk", s, d_w)
            d["v"][t] = -d_w
            d_s = d_s + self.erase[t][..., None] * d_w[..., None, :]
            d_s, d_m = d_s * self.keep[t], d_m * self.keep[t]
        if "p" in d:
            d["p"] = d_erase
        else:
            d_alpha += (d_erase * self.k).sum(-1)
            d_k += self.alpha[..., None] * d_erase
        d["log_alpha"], d["log_mu"] = self.alpha * d_alpha, self.mu * d_mu
        d["q"], d["k"] = (
            self._unit_gradient(self.given[name], x) for name, x in (("q", d_q), ("k", d_k))
        )
        gradients: dict[str, Any] = {name: self._per_own_head(x, name) for name, x in d.items()}
        if self.entering:
            gradients["initial_state"] = MDNState(d_s, d_m)  # type: ignore[arg-type]
        return gradients


def _norm(x: F64) -> F64:
    """`sqrt(sum(x^2) + 1e-6)` over the last axis, also where squares overflow."""
    size = np.maximum(np.abs(x).max(-1, keepdims=True), 1.0)
    return size * np.sqrt(((x / size) ** 2).sum(-1, keepdims=True) + EPSILON / size / size)
