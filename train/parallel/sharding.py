"""Where the arrays of a run lie: the mesh, and the axes over which each parameter is cut."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from mdn_jax.errors import RunError
from mdn_jax.layers.partition import of_parameter
from mdn_jax.layers.sharding import CONTEXT, DATA, FSDP, ROWS, TENSOR
from mdn_jax.models.causal_lm import STATE_MIXERS
from mdn_jax.models.on_mesh import tensor_sizes
from train.config import TrainConfig
from train.config_sections import MeshConfig
from train.stacking import is_stacked

AXES = (DATA, FSDP, CONTEXT, TENSOR)
"""Of a mesh, from the outermost: what is sent most goes over the nearest devices."""


def partition(path: tuple[Any, ...], x: Any) -> PartitionSpec:
    """How an array of the training state is cut, by the end of its path in the state.

    The moments of the optimizer have the names of their parameters and are cut as they are;
    scalars are on every device. A stack is cut as each of its layers.

    Raises:
      KeyError: a parameter that nothing says of how it is cut.
    """
    if x.ndim == 0:
        return PartitionSpec()
    spec = of_parameter(jax.tree_util.keystr(path, simple=True, separator="."))
    return PartitionSpec(None, *spec) if is_stacked(path) else spec


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run.

    Args:
      config: sizes of its axes.
      devices: to use; None: all of all processes.

    Raises:
      RunError: sizes that do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, name) for name in AXES]
    known = math.prod(size for size in sizes if size != -1)
    wanted = " * ".join(f"mesh.{name}" for name in AXES)
    got = " x ".join(map(str, sizes))
    if -1 in sizes and len(devices) % known:
        raise RunError(
            f"{wanted}: expected a divisor of the {len(devices)} devices beside -1, got {got}"
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise RunError(
            f"{wanted}: expected the number of devices, {len(devices)}, got {got} = "
            f"{math.prod(sizes)} (-1 in one of them stands for the rest)"
        )
    return jax.make_mesh(sizes, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def check_divisible(config: TrainConfig, mesh: Mesh, params: Any) -> None:
    """Raises unless the mesh divides the batch, the heads and every parameter.

    Args:
      config: of the run.
      mesh: its mesh.
      params: parameters or their shapes.

    Raises:
      RunError: names the axis and what it does not divide.
    """
    rows = config.batch_size // config.accumulation
    _check_divisor(mesh, ROWS, f"batch_size / accumulation = {rows}", rows)
    for name, size in tensor_sizes(config.model).items():
        _check_divisor(mesh, (TENSOR,), f"model.{name} = {size}", size)
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        for axes, size in zip(partition(path, x), x.shape, strict=False):
            names = (axes,) if isinstance(axes, str) else axes or ()
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            _check_divisor(mesh, names, f"{size}, a dimension of {where} {list(x.shape)}", size)


def check_context(config: TrainConfig, mesh: Mesh) -> None:
    """Raises unless the rows can be cut over the mesh's axis `context`.

    Args:
      config: of the run.
      mesh: its mesh.

    Raises:
      RunError: names what does not fit.
    """
    parts, length, model = mesh.shape[CONTEXT], config.sequence_length, config.model
    if parts == 1:
        return
    for kind in model.mixers:
        if kind != "attention" and not STATE_MIXERS[kind].in_context:
            raise RunError(f"mesh.{CONTEXT}: expected 1 with the mixer {kind}, got {parts}")
    _check_divisor(mesh, (CONTEXT,), f"sequence_length = {length}", length)
    if model.use_short_conv and length // parts < model.conv_size:
        raise RunError(
            f"mesh.{CONTEXT}: expected stretches of at least {model.conv_size} tokens "
            f"(model.conv_size), got {length // parts}: sequence_length = {length} over {parts}"
        )


def _check_divisor(mesh: Mesh, axes: Sequence[str], what: str, size: int) -> None:
    parts = math.prod(mesh.shape[name] for name in axes)
    if size % parts:
        names = " * ".join(f"mesh.{name}" for name in axes)
        raise RunError(f"{names}: expected a divisor of {what}, got {parts}")


def with_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shapes and dtypes of a training state, or a part of one, with where each array lies."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, partition(path, x))
        ),
        tree,
    )


def on_mesh[**P, R](mesh: Mesh, function: Callable[P, R]) -> Callable[P, R]:
    """The function with the mesh as the ambient one, which the layers ask for."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.set_mesh(mesh):
            return function(*args, **kwargs)

    return run


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`, the tokens of a row over `context`."""
    return NamedSharding(mesh, PartitionSpec(ROWS, CONTEXT))


class Share(NamedTuple):
    """The part of every batch that a process has to bring.

    Attributes:
      part: its index.
      parts: number of equal parts that the rows are cut into. Below the number of processes where
        `context` or `tensor` spans several of them: these bring the same rows, whole.
    """

    part: int
    parts: int

    def rows(self, batch_size: int) -> slice:
        """Its rows of a batch."""
        size = batch_size // self.parts
        return slice(self.part * size, (self.part + 1) * size)


def process_share(mesh: Mesh, process: int | None = None) -> Share:
    """Which rows a process holds (None: this one).

    Raises:
      RunError: devices in an order that gives the processes unequal parts.
    """
    process = jax.process_index() if process is None else process
    groups = mesh.devices.reshape(mesh.shape[DATA] * mesh.shape[FSDP], -1)
    ours = [i for i, group in enumerate(groups) if any(d.process_index == process for d in group)]
    count, left = divmod(len(groups), len(ours))
    if left or ours[0] % len(ours) or ours[-1] - ours[0] != len(ours) - 1:
        raise RunError(
            "mesh: expected axes that give every process an equal, contiguous part of the rows, "
            f"got {dict(mesh.shape)}, where process {process} holds parts {ours} of {len(groups)}"
        )
    return Share(ours[0] // len(ours), count)


def from_local[T](mesh: Mesh, batch: T) -> T:
    """A global batch from each process's own rows, `[rows of its share, T]`, whole rows."""
    share = process_share(mesh)
    return jax.tree.map(
        lambda x: _placed(mesh, x, share.part * len(x), share.parts * len(x)), batch
    )


def from_global[T](mesh: Mesh, batch: T) -> T:
    """A global batch from all of its rows, which every process has."""
    return jax.tree.map(lambda x: _placed(mesh, np.asarray(x), 0, len(x)), batch)


def _placed(mesh: Mesh, rows: NDArray[Any], first: int, count: int) -> jax.Array:
    """A global array of so many rows, of which these, from `first` on, are this process's."""

    def piece(index: Any) -> NDArray[Any]:
        start, stop, _ = index[0].indices(count)
        return rows[(slice(start - first, stop - first), *index[1:])]

    shape = (count, *rows.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh), piece)
