"""Random inputs of the rule: every gate regime, hard keys, packed documents, cotangents."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mdn_jax.ops.state import MDNState

Gates = dict[str, np.ndarray]


def _layer_gates(rng: np.random.Generator, shape: tuple[int, ...]) -> Gates:
    """Gates with the statistics of the layer's initialisation (A and Mu in U(0, 16))."""
    heads = shape[-1]
    eta = 1 + np.tanh(rng.normal(0, 0.1, shape))
    theta = np.arctan(eta * rng.uniform(0, 4, heads))

    def decay() -> np.ndarray:
        bias = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), heads))
        return rng.uniform(0, 16, heads) * np.logaddexp(0, rng.normal(0, 0.1, shape) + np.log(bias))

    return {
        "log_alpha": 2 * np.log(np.cos(theta)) - decay(),
        "log_mu": np.maximum(-decay(), -2.0),
        "beta": np.sin(theta) ** 2 / (1 + np.exp(rng.normal(0, 0.3, shape))),
        "eta": eta,
    }


def _constant_momentum(log_mu: float) -> Callable[[np.random.Generator, tuple[int, ...]], Gates]:
    def gates(rng: np.random.Generator, shape: tuple[int, ...]) -> Gates:
        alpha = rng.uniform(0.95, 1.0, shape)
        return {
            "log_alpha": np.log(alpha),
            "log_mu": np.full(shape, log_mu),
            "beta": (1 - alpha) * rng.uniform(0, 1, shape),
            "eta": rng.uniform(0, 2, shape),
        }

    return gates


def _wide_gates(rng: np.random.Generator, shape: tuple[int, ...]) -> Gates:
    """Everything at once: log mu from 0 to -30, alpha from 1 to e^-20, eta from 0 to 2."""
    log_alpha = np.where(rng.random(shape) < 0.7, -rng.exponential(0.02, shape), 0)
    log_alpha = np.where(rng.random(shape) < 0.1, -20 * rng.random(shape), log_alpha)
    log_mu = np.where(rng.random(shape) < 0.5, -rng.exponential(0.05, shape), 0)
    log_mu = np.where(rng.random(shape) < 0.2, -30 * rng.random(shape), log_mu)
    eta = np.where(rng.random(shape) < 0.2, 2 * rng.integers(0, 2, shape), 2 * rng.random(shape))
    return {
        "log_alpha": log_alpha,
        "log_mu": log_mu,
        "beta": -np.expm1(log_alpha) * rng.random(shape),
        "eta": eta,
    }


def _half_beta_zero(rng: np.random.Generator, shape: tuple[int, ...]) -> Gates:
    gates = _layer_gates(rng, shape)
    return gates | {"beta": gates["beta"] * (rng.random(shape) < 0.5)}


def _ballistic_gates(rng: np.random.Generator, shape: tuple[int, ...]) -> Gates:
    """Long memory and long momentum: alpha and mu near 1, small steps."""
    log_alpha = -rng.exponential(1e-3, shape)
    return {
        "log_alpha": log_alpha,
        "log_mu": -rng.exponential(1e-3, shape),
        "beta": -np.expm1(log_alpha) * rng.random(shape),
        "eta": rng.uniform(0, 2, shape),
    }


GATE_REGIMES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Gates]] = {
    "layer": _layer_gates,
    "momentum_quarter": _constant_momentum(-0.25),
    "momentum_half": _constant_momentum(-0.5),
    "momentum_one": _constant_momentum(-1.0),
    "momentum_lost": _constant_momentum(-30.0),
    "ballistic": _ballistic_gates,
    "half_beta_zero": _half_beta_zero,
    "wide": _wide_gates,
}
"""Gate generators `(rng, [B, T, HV]) -> log_alpha, log_mu, beta, eta`, by name."""


def random_inputs(
    *,
    seed: int,
    batch: int = 2,
    length: int = 65,
    heads: int = 2,
    value_heads: int | None = None,
    key_dim: int = 16,
    value_dim: int = 24,
    regime: str | tuple[str, ...] = "layer",
    keys: str | tuple[str, ...] = "random",
    dtype: jax.typing.DTypeLike = np.float32,
    explicit_p: bool = False,
    initial_state: bool = True,
    documents: int = 1,
) -> dict[str, Array | MDNState]:
    """Random keyword arguments for `momentum_delta_rule`.

    Args:
      seed: of everything.
      batch: `B`.
      length: `T`.
      heads: `H`.
      value_heads: `HV`; None means `heads`.
      key_dim: `K`.
      value_dim: `V`.
      regime: gates, one of `GATE_REGIMES`; several: row `b` has number `b` of them, round and
        round, so that one call (and one compilation) has them all.
      keys: "random", "parallel" (all near one direction, the hardest for the inverse) or "zero"
        (a third of the rows of q and k exactly zero); several: as for `regime`.
      dtype: of q, k, v, p; gates and states are float64 if it is, else float32.
      explicit_p: with an erase key independent of k.
      initial_state: with a random entering state.
      documents: number of packed documents a row, at random boundaries.
    """
    options: dict[str, Any] = {
        "length": length,
        "heads": heads,
        "value_heads": value_heads,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "dtype": dtype,
        "explicit_p": explicit_p,
        "initial_state": initial_state,
        "documents": documents,
    }
    if isinstance(regime, tuple) or isinstance(keys, tuple):
        regimes, kinds = (x if isinstance(x, tuple) else (x,) for x in (regime, keys))
        rows = [
            random_inputs(
                seed=1000 * seed + row,
                batch=1,
                regime=regimes[row % len(regimes)],
                keys=kinds[row % len(kinds)],
                **options,
            )
            for row in range(batch)
        ]
        return jax.tree.map(lambda *x: jnp.asarray(np.concatenate(x)), *rows)
    rng = np.random.default_rng(seed)
    value_heads = value_heads or heads
    wide = np.float64 if np.dtype(dtype) == np.float64 else np.float32

    def narrowed(x: np.ndarray) -> Array:
        """Rounded on the host: nothing is compiled."""
        return jnp.asarray(x.astype(dtype))

    q, k = rng.normal(size=(2, batch, length, heads, key_dim))
    if keys == "parallel":
        k = rng.normal(size=(batch, 1, heads, key_dim)) + 0.03 * k
    elif keys == "zero":
        q, k = (x * (rng.random((batch, length, heads, 1)) < 2 / 3) for x in (q, k))
    elif keys != "random":
        raise ValueError(f"keys: expected random, parallel or zero, got {keys!r}")
    inputs: dict[str, Array | MDNState] = {
        "q": narrowed(q),
        "k": narrowed(k),
        "v": narrowed(rng.normal(size=(batch, length, value_heads, value_dim))),
    }
    gates = GATE_REGIMES[regime](rng, (batch, length, value_heads))
    inputs |= {name: jnp.asarray(np.asarray(gate, wide)) for name, gate in gates.items()}
    if explicit_p:
        p = rng.normal(size=(batch, length, heads, key_dim))
        p /= np.linalg.norm(p, axis=-1, keepdims=True)
        inputs["p"] = narrowed(0.9 * p)
    if initial_state:
        s, m = rng.normal(size=(2, batch, value_heads, key_dim, value_dim)) * 0.3
        inputs["initial_state"] = MDNState(*(jnp.asarray(x.astype(wide)) for x in (s, m)))
    if documents > 1:
        cuts = np.sort(rng.integers(0, length, (batch, documents - 1)), axis=1)
        ids = (np.arange(length)[None, :, None] >= cuts[:, None, :]).sum(-1)
        inputs["segment_ids"] = jnp.asarray(ids.astype(np.int32))
    return inputs


def random_cotangents(
    inputs: dict[str, Any], seed: int = 99
) -> tuple[Float[Array, "B T HV V"], MDNState]:
    """Random cotangents of the outputs and the final state, so that each carries gradient."""
    rng = np.random.default_rng(seed)
    v, key_dim = inputs["v"], inputs["k"].shape[-1]
    state = (v.shape[0], v.shape[2], key_dim, v.shape[3])
    wide = np.float64 if v.dtype == np.float64 else np.float32

    def normal(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32).astype(dtype))

    final = MDNState(normal(state, wide), normal(state, wide))
    return normal(v.shape, v.dtype), final
