"""The warning of calls that the kernels could run if JAX still had their backend."""

import warnings

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
        stacklevel=3,
    )
