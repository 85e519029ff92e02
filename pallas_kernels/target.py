"""Lowering for a GPU that is elsewhere."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

DEVICES = {(8, 0): ("NVIDIA A100-SXM4-80GB", 108), (9, 0): ("NVIDIA H100 80GB HBM3", 132)}
"""Device kind and number of cores by compute capability."""


@contextmanager
def target_gpu(
    capability: tuple[int, int], axes: Mapping[str, int] | None = None
) -> Iterator[None]:
    """Within it, jax lowers for a GPU, or a mesh of them, that need not be here.

    Args:
      capability: compute capability, one of `DEVICES`.
      axes: name and size of the mesh's axes.

    Raises:
      ValueError: another capability.
    """
    if capability not in DEVICES:
        raise ValueError(f"capability: expected one of {list(DEVICES)}, got {capability!r}")
    kind, cores = DEVICES[capability]
    axes = axes or {}
    mesh = AbstractMesh(
        tuple(axes.values()),
        tuple(axes),
        (AxisType.Auto,) * len(axes),
        abstract_device=AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu"),
    )
    with use_abstract_mesh(mesh), warnings.catch_warnings():
        # jax announces that its Triton backend will leave
        warnings.filterwarnings("ignore", ".*Triton backend", DeprecationWarning)
        yield


def targeted() -> tuple[int, int] | None:
    """The compute capability that `target_gpu` gives; None outside of it."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    for capability, (kind, cores) in DEVICES.items():
        if device == AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu"):
            return capability
    return None
