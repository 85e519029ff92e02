"""The momentum delta rule as pure functions."""

from mdn_jax.ops.api import momentum_delta_rule
from mdn_jax.ops.state import MDNState

__all__ = ["MDNState", "momentum_delta_rule"]
