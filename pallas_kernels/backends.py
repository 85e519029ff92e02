"""Which backends of Pallas the installed JAX has: the one place that asks (docs/backends.md)."""

import importlib
from typing import Any

import jax

WITHOUT_TRITON = (
    "a JAX whose Pallas has the Triton backend (0.11 and 0.12 have it), got jax "
    f"{jax.__version__} without it"
)
"""What the kernels expect and what came, where the backend is gone."""

_TRITON = "jax.experimental.pallas.triton"


def triton_lacks() -> str | None:
    """`WITHOUT_TRITON` where the installed JAX has no Triton backend; None where it has."""
    try:
        _ = importlib.import_module(_TRITON).CompilerParams
    except (ImportError, AttributeError):
        return WITHOUT_TRITON
    return None


def triton_parameters(*, warps: int, stages: int) -> Any:
    """Compiler parameters of Pallas' Triton backend.

    Args:
      warps: of a program.
      stages: of the software pipeline.

    Raises:
      ValueError: the installed JAX has no such backend.
    """
    if lacking := triton_lacks():
        raise ValueError(f"jax: the kernels expect {lacking}")
    return importlib.import_module(_TRITON).CompilerParams(num_warps=warps, num_stages=stages)
