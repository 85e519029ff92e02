"""Memories with decay and without momentum, as pure functions: what MDN is compared with."""

from mdn_jax.ops.gated.api import (
    GatedImplementation,
    gated_delta_rule,
    gated_linear_attention,
    kimi_delta_rule,
)
from mdn_jax.ops.gated.channel_gates import gated_delta_rule_2
from mdn_jax.ops.gated.trapezoidal import TrapezoidalState, trapezoidal_linear_attention

__all__ = [
    "GatedImplementation",
    "TrapezoidalState",
    "gated_delta_rule",
    "gated_delta_rule_2",
    "gated_linear_attention",
    "kimi_delta_rule",
    "trapezoidal_linear_attention",
]
