"""The operator on the GPU kernels with a number of pieces that is asked for, not chosen."""

from typing import Any

from jaxtyping import Array

from mdn_jax import MDNState
from mdn_jax.ops import api
from mdn_jax.ops.inputs import in_full_precision
from mdn_jax.ops.kernels import kernel_rule
from mdn_jax.testing import Rule
from pallas_kernels.momentum_delta import Numerics


def rule_in_pieces(pieces: int | None, *, interpret: bool = False) -> Rule:
    """`momentum_delta_rule` on the kernels, whose state passes cut a row in pieces.

    Args:
      pieces: how many; None: as many as ship for the shape.
      interpret: in the interpreter, with the tiles of compute capability 9.0.
    """

    def rule(**arrays: Any) -> tuple[Array, MDNState]:
        capability = (9, 0) if interpret else api._capability()
        if capability is None:
            raise ValueError("pieces: expected a CUDA GPU, got none")
        numerics = Numerics.choose(
            arrays["q"].dtype, full_precision=in_full_precision(), capability=capability
        )
        return kernel_rule(
            **arrays,
            precise=numerics.precise,
            pieces=pieces,
            capability=capability,
            interpret=interpret,
        )

    return rule
