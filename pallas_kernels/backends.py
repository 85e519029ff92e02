"""Which backends of Pallas the installed JAX has, and whether jax-triton fits it.

The one place that asks (docs/backends.md).
"""

import importlib
import importlib.metadata
import importlib.util
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


def triton_memory() -> Any:
    """`load` and `store` of Pallas' Triton backend, which take masks; also for the interpreter."""
    return importlib.import_module(_TRITON)


def jax_triton_lacks() -> str | None:
    """What `decode_triton` would need that is not installed; None if it can run."""
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton, which is not installed (mdn-jax's extra 'triton')"
    try:
        version = importlib.metadata.version("jax-triton")
    except importlib.metadata.PackageNotFoundError:  # from a folder
        return None
    # 0.4 counts results that take an operand's memory anew, and JAX 0.12 cannot lower its calls
    if tuple(map(int, version.split(".")[:2])) > (0, 3):
        return f'jax-triton below 0.4 (pip install "jax-triton<0.4"), got {version}'
    return None
