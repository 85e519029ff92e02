"""Which activations of a block are kept for the backward pass, and which are computed again.

| choice     | kept of a block                            | computed again                        |
|------------|--------------------------------------------|---------------------------------------|
| `"none"`   | every input that a derivative needs        | norms and activations: nothing wide   |
| `"dots"`   | outputs of its projections; of the rule,   | norms, convolutions, activations, the |
|            | factors of the chunks, errors and outputs  | states of the chunks                  |
| `"kernel"` | of the rule, factors, errors and outputs   | projections too                       |
| `"block"`  | its input                                  | everything                            |

From top to bottom memory falls and time rises: `"block"` runs the whole forward pass twice, about a
third more operations; `"kernel"` all but the kernels and the projections after them; `"dots"` no
product but those of the one kernel that makes the states, the largest part of what `"none"` keeps.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from mdn_jax.layers.momentum_deltanet import RULE_OUTPUT

Remat = Literal["none", "dots", "kernel", "block"]


def check_remat(remat: str) -> None:
    """Raises ValueError unless `remat` is one of the choices."""
    if remat not in get_args(Remat):
        raise ValueError(f"remat: expected one of {', '.join(get_args(Remat))}, got {remat!r}")


def with_remat[**P, R](function: Callable[P, R], remat: Remat) -> Callable[P, R]:
    """The function, keeping for its derivative what the choice says."""
    if remat == "none":
        return function
    return jax.checkpoint(function, policy=_policy(remat))


def _policy(remat: Remat) -> Callable[..., Any] | None:
    if remat == "block":
        return None
    from pallas_kernels.momentum_delta import CHUNK_FACTORS  # only training pays for the import

    policies = jax.checkpoint_policies
    names = policies.save_only_these_names(CHUNK_FACTORS, RULE_OUTPUT)
    if remat == "kernel":
        return names
    return policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, names)
