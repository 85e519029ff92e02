"""Which activations of a block are kept for the backward pass, and which are computed again.

| choice     | kept of a block                            | computed again                        |
|------------|--------------------------------------------|---------------------------------------|
| `"none"`   | every input that a derivative needs        | norms and activations: nothing wide   |
| `"states"` | the same without the states of the chunks  | the states, by one kernel             |
| `"dots"`   | outputs of its projections; of the rule,   | norms, convolutions, activations and  |
|            | factors of the chunks, errors and outputs  | the states                            |
| `"kernel"` | of the rule, factors, errors and outputs   | projections too                       |
| `"block"`  | its input                                  | everything                            |

From top to bottom memory falls and time rises: `"block"` runs the whole forward pass twice, about a
third more operations; `"kernel"` all but most of the kernels; `"dots"` no products but those of the
kernel that makes the states, as `"states"`, which repeats nothing else. The states are the largest
part of what `"none"` keeps. Kernels are those of GPUs; of the rule in other
implementations nothing inside it is kept from `"states"` on.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from mdn_jax.ops.residuals import RULE_OUTPUT, keep_factors

Remat = Literal["none", "states", "dots", "kernel", "block"]


def check_remat(remat: str) -> None:
    """Raises ValueError unless `remat` is one of the choices."""
    if remat not in get_args(Remat):
        raise ValueError(f"remat: expected one of {', '.join(get_args(Remat))}, got {remat!r}")


def with_remat[**P, R](block: Callable[P, R], remat: Remat) -> Callable[P, R]:
    """The function of a block, keeping for its derivative what the choice says.

    With `"states"` the block's layer does it (`MomentumDeltaNet(keep_states=False)`).
    """
    if remat in ("none", "states"):
        return block
    return jax.checkpoint(block, policy=_policy(remat))


def _policy(remat: Remat) -> Callable[..., Any] | None:
    policies = jax.checkpoint_policies
    if remat == "block":
        return None
    if remat == "kernel":
        return keep_factors(RULE_OUTPUT)
    return policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, keep_factors(RULE_OUTPUT)
    )
