"""Memories with decay and without momentum, as pure functions: what MDN is compared with."""

from mdn_jax.ops.gated.api import (
    GatedImplementation,
    gated_delta_rule,
    gated_linear_attention,
    kimi_delta_rule,
)

__all__ = [
    "GatedImplementation",
    "gated_delta_rule",
    "gated_linear_attention",
    "kimi_delta_rule",
]
