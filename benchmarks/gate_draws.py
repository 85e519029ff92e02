"""Gates to compare numerics on: regimes of constant strength, and published initialisations."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from mdn_jax.layers.gates import MomentumGates
from mdn_jax.testing import GATE_REGIMES

# (rng, [1, T, H]) -> log_alpha, log_mu, beta, eta
Gates = Callable[[np.random.Generator, tuple[int, ...]], dict[str, NDArray[Any]]]

_SIZES: dict[str, dict[str, float]] = {
    "400M": {"hidden_size": 1024, "min_log_mu": -2.0, "tau_factor": 1.0},
    "1.3B": {"hidden_size": 2048, "min_log_mu": -1.0, "tau_factor": 8.0},
}


def published_gates(
    name: Literal["400M", "1.3B"], heads: int, length: int, *, seed: int
) -> dict[str, NDArray[np.float32]]:
    """Gates of freshly initialised heads on inputs N(0, 1), `[1, length, heads]`.

    Every head has parameters of its own, so that `heads` of them are as many draws.
    """
    hidden = int(_SIZES[name]["hidden_size"])
    gates = nnx.jit(
        lambda rngs: MomentumGates(
            hidden,
            heads,
            min_log_mu=_SIZES[name]["min_log_mu"],
            tau_factor=_SIZES[name]["tau_factor"],
            rngs=rngs,
        )
    )(nnx.Rngs(seed))
    x = jax.random.normal(jax.random.key(seed + 1), (1, length, hidden), jnp.float32)
    return {n: np.asarray(g, np.float32) for n, g in gates(x)._asdict().items()}


def _at_initialisation(
    name: Literal["400M", "1.3B"], rng: np.random.Generator, shape: tuple[int, ...]
) -> dict[str, NDArray[Any]]:
    return dict(published_gates(name, shape[2], shape[1], seed=int(rng.integers(2**31))))


def _long_memory(
    log_mu: Callable[[np.random.Generator, tuple[int, ...]], NDArray[Any]],
    rng: np.random.Generator,
    shape: tuple[int, ...],
) -> dict[str, NDArray[Any]]:
    """Alpha uniform in [0.95, 1], with a momentum of any strength."""
    return GATE_REGIMES["momentum_half"](rng, shape) | {"log_mu": log_mu(rng, shape)}


def _half_beta_zero(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, NDArray[Any]]:
    return {
        "log_alpha": -0.1 * rng.random(shape),
        "log_mu": -0.6 * rng.random(shape),
        "beta": 0.5 * rng.random(shape) * (rng.random(shape) < 0.5),
        "eta": 2 * rng.random(shape),
    }


REGIMES: dict[str, Gates] = {
    "as the layer starts": GATE_REGIMES["layer"],
    "log mu = -0.25": GATE_REGIMES["momentum_quarter"],
    "log mu = -0.5": GATE_REGIMES["momentum_half"],
    "log mu = -1": GATE_REGIMES["momentum_one"],
    "log mu = -1.5": partial(_long_memory, lambda rng, shape: np.full(shape, -1.5)),
    "log mu random, at least -2": partial(
        _long_memory, lambda rng, shape: np.maximum(-rng.exponential(4.0, shape), -2.0)
    ),
    "a constant log mu a head, 0 to -1.5": partial(
        _long_memory, lambda rng, shape: np.broadcast_to(np.linspace(0, -1.5, shape[2]), shape)
    ),
    "beta = 0 on half of the steps": _half_beta_zero,
    "400M initialisation": partial(_at_initialisation, "400M"),
    "1.3B initialisation": partial(_at_initialisation, "1.3B"),
}
"""Gates by name; those with a constant log mu have alpha uniform in [0.95, 1]."""
