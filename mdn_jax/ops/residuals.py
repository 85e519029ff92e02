"""What the rule keeps for its backward pass, by name."""

from collections.abc import Callable
from typing import Any

import jax

RULE_OUTPUT = "mdn_output"
"""Name that layers give the rule's outputs, for policies of `jax.checkpoint`."""


def keep_factors(*others: str) -> Callable[..., Any]:
    """Policy of `jax.checkpoint`: what the kernels keep but the states, and other names."""
    from pallas_kernels.momentum_delta import CHUNK_FACTORS  # not imported with the library

    return jax.checkpoint_policies.save_only_these_names(CHUNK_FACTORS, *others)


def without_states[**P, R](rule: Callable[P, R]) -> Callable[P, R]:
    """The rule with its states computed again in the backward pass, by one kernel.

    They are the largest part of what the kernels keep. Of other implementations everything inside
    the rule is computed again.
    """
    return jax.checkpoint(rule, policy=keep_factors())
