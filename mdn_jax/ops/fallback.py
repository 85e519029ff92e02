"""What is said where an implementation cannot do what the call asks for."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LIBRARY = str(Path(__file__).parents[1])
_warned = False


class MissingBackendWarning(UserWarning):
    """JAX has lost the backend of the GPU kernels, and something slower runs in their place."""


def warn_without_backend(lacking: str | None) -> None:
    """Warns, once in a process, where the kernels lack nothing but their backend.

    Args:
      lacking: what they lack, from `kernels_lack`.
    """
    global _warned
    if lacking is None or _warned:
        return
    from pallas_kernels.backends import WITHOUT_TRITON  # not imported with the library

    if lacking != WITHOUT_TRITON:
        return
    _warned = True
    warnings.warn(
        f'implementation: "pallas_triton" expects {lacking}; calls with None run on '
        '"xla", which is slower (docs/backends.md: the ways on)',
        MissingBackendWarning,
        skip_file_prefixes=(_LIBRARY,),  # who called the rule
    )


@contextmanager
def reverse_mode_alone(argument: str, expected: str | None, got: str) -> Iterator[None]:
    """Says what to use where forward mode meets a rule with a backward pass of its own."""
    try:
        yield
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        quoted = "None" if expected is None else f'"{expected}"'
        raise TypeError(
            f"{argument}: expected {quoted} under forward-mode differentiation (jax.jvp, "
            f'jax.jacfwd, jax.hessian), got "{got}"'
        ) from None
