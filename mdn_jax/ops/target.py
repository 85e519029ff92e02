"""Lowering for a GPU that is elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def target_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Within it, calls are traced and lowered for a CUDA GPU that need not be in this machine.

    The rule takes the kernels, with the tiles of that GPU, for `implementation=None` where they
    support the call. What is traced here runs on GPUs of this capability alone::

        with target_gpu((9, 0)):
            exported = jax.export.export(
                jax.jit(f),
                platforms=["cuda"],
                disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(TRITON_CALL)],
            )(*arguments)

    Args:
      capability: compute capability: (8, 0) for an A100, (9, 0) for an H100 or H200.

    Raises:
      ValueError: another capability.
    """
    from pallas_kernels import target  # not imported with the library

    with target.target_gpu(capability):
        yield


TRITON_CALL = "__gpu$xla.gpu.triton"
"""The custom call of a kernel. JAX guarantees the meaning of none, so `jax.export` wants to be told
that an exported program will be run by the same version of JAX."""
