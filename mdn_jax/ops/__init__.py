"""The momentum delta rule, and the rules it is compared with, as pure functions."""

from mdn_jax.ops.api import momentum_delta_rule
from mdn_jax.ops.fallback import MissingBackendWarning
from mdn_jax.ops.gated import (
    TrapezoidalState,
    gated_delta_rule,
    gated_delta_rule_2,
    gated_linear_attention,
    kimi_delta_rule,
    trapezoidal_linear_attention,
)
from mdn_jax.ops.replay import fold, replay_state, replay_steps, rewind
from mdn_jax.ops.state import (
    STATE_DTYPES,
    CompactState,
    MDNState,
    ReplayState,
    StateDtype,
    full,
    keep,
)
from mdn_jax.ops.target import TRITON_CALL, target_gpu

__all__ = [
    "STATE_DTYPES",
    "TRITON_CALL",
    "CompactState",
    "MDNState",
    "MissingBackendWarning",
    "ReplayState",
    "StateDtype",
    "TrapezoidalState",
    "fold",
    "full",
    "gated_delta_rule",
    "gated_delta_rule_2",
    "gated_linear_attention",
    "keep",
    "kimi_delta_rule",
    "momentum_delta_rule",
    "replay_state",
    "replay_steps",
    "rewind",
    "target_gpu",
    "trapezoidal_linear_attention",
]
