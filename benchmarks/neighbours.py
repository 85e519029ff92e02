"""Another project's operator beside this one's: the gated delta rule of jax-linear-attention.

It has one state and half the operations (`6 K V` a token and head), so its times say how far a
simpler operator of the same shape is, not which implementation is better. It is the momentum delta
rule at `mu = 0, eta = 1`, which is what it is checked against.
"""

import importlib
import importlib.metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.testing import Inputs, Limits, Rule

PACKAGE = "jax-linear-attention"
ARGUMENTS = ("q", "k", "v", "log_alpha", "beta")
LIMITS = Limits(2e-2, 2e-2)
"""Wider than this project's: whether it computes the same, not how well."""


class Neighbour(NamedTuple):
    """An operator to be timed beside this project's.

    Attributes:
      name: with its version, for the table.
      rule: takes `ARGUMENTS`; the momentum that it returns is zero.
    """

    name: str
    rule: Rule


def gated_delta_rule() -> Neighbour | str:
    """The gated delta rule of jax-linear-attention; else why it cannot be timed."""
    try:
        ops = importlib.import_module("jla.ops")
    except ImportError as error:
        return f"{PACKAGE} cannot be imported ({error}), its gated delta rule is not timed"
    if "gated_deltanet" not in getattr(ops, "KINDS", ()) or not hasattr(ops, "linear_attention"):
        return f"{PACKAGE} has no jla.ops.linear_attention with gated_deltanet: it is not timed"
    # by name on a GPU, so that it never falls back to plain JAX unseen
    implementation = "mosaic_gpu" if jax.default_backend() == "gpu" else "auto"

    def rule(
        *, q: Array, k: Array, v: Array, log_alpha: Array, beta: Array
    ) -> tuple[Array, MDNState]:
        o, s = ops.linear_attention(
            "gated_deltanet",
            q,
            k,
            v,
            g=log_alpha,
            beta=beta,
            impl=implementation,
            use_qk_l2norm=True,
            output_final_state=True,
        )
        return o, MDNState(s, jnp.zeros_like(s))

    version = importlib.metadata.version(PACKAGE)
    return Neighbour(f"gated delta rule, half the flops ({PACKAGE} {version})", rule)


def reference_rule(**arrays: Any) -> tuple[Array, MDNState]:
    """The same by this project's scan."""
    gate = arrays["log_alpha"]
    o, state = momentum_delta_rule(
        **arrays,
        log_mu=jnp.full_like(gate, -jnp.inf),
        eta=jnp.ones_like(gate),
        implementation="scan",
    )
    return o, MDNState(state.s, jnp.zeros_like(state.m))


def neighbour_inputs(inputs: Inputs) -> Inputs:
    """Those of the inputs that it takes."""
    return {name: inputs[name] for name in ARGUMENTS}
