"""The rules under a mesh: each device runs what it holds of rows, tokens and heads.

The partitioner of `jax.jit` cannot look into a GPU kernel and would gather all of its operands on
every device; inside `jax.shard_map` each device calls it with its own part.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

Axes = tuple[str, ...]


class Cuts(NamedTuple):
    """Axes of a mesh over which the arrays of a rule are cut.

    Attributes:
      rows: those of dimension `B`.
      time: those of dimension `T`.
      heads: those of the dimensions `H` and `HV`.
    """

    rows: Axes = ()
    time: Axes = ()
    heads: Axes = ()


def on_devices(
    rule: Callable[..., tuple[Array, Any]],
    arguments: dict[str, Any],
    cuts: Cuts,
    axes: Iterable[str],
    mesh: Mesh | AbstractMesh | None = None,
) -> tuple[Array, Any]:
    """A rule inside `jax.shard_map`.

    Args:
      rule: function of arrays `[B, T, heads, ...]` by name, `initial_state` `[B, heads, ...]` and
        `segment_ids` `[B, T]`, to an output and a state of the same axes.
      arguments: its arguments by name. A single head that others share goes to all devices.
      cuts: over which axes.
      axes: of the mesh, all that no surrounding `jax.shard_map` and no partitioner has.
      mesh: None: the ambient one.
    """
    rows, time, heads = (cut or None for cut in cuts)
    arrays = {name: x for name, x in arguments.items() if getattr(x, "ndim", 0) >= 3}
    arrays |= {name: arguments.get(name) for name in ("initial_state", "segment_ids")}
    options = {name: x for name, x in arguments.items() if name not in arrays}
    if time is not None:
        options["context_axis"] = time[0]

    def of_steps(x: Array) -> PartitionSpec:
        if x.ndim == 2:
            return PartitionSpec(rows, time)
        return PartitionSpec(rows, time, heads if x.shape[2] > 1 else None)

    per_state = PartitionSpec(rows, heads)
    specs = {
        name: jax.tree.map(lambda _: per_state, x)
        if name == "initial_state"
        else jax.tree.map(of_steps, x)
        for name, x in arrays.items()
    }
    if mesh is not None:
        arrays = jax.tree.map(functools.partial(_placed, mesh), arrays, specs)
    return jax.shard_map(
        lambda arrays: rule(**arrays, **options),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(PartitionSpec(rows, time, heads), per_state),
        axis_names=frozenset(axes),
        check_vma=types_are_checked(arrays),
    )(arrays)


def _placed(mesh: Mesh | AbstractMesh, x: Array, spec: PartitionSpec) -> Array:
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))


def types_are_checked(arrays: Any) -> bool:
    """Whether types say over which axes of surrounding `jax.shard_map`s the arrays differ.

    They do not where one has `check_vma=False`, and then one inside it must have that too.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return True
    return any(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays))


def fitting(axes: Axes, sizes: dict[str, int], *dimensions: int) -> Axes:
    """Those axes of more than one device, if all of them together divide the dimensions."""
    there = tuple(name for name in axes if sizes.get(name, 1) > 1)
    parts = math.prod(sizes[name] for name in there)
    return there if all(size % parts == 0 for size in dimensions) else ()


def head_counts(arguments: dict[str, Any]) -> list[int]:
    """Of the arrays `[B, T, heads, ...]`; 1 only where all have a single head."""
    counts = [x.shape[2] for x in arguments.values() if getattr(x, "ndim", 0) >= 3]
    return [count for count in counts if count > 1] or [1]


def under_explicit_meshes[**P, R](
    rule: Callable[P, R], *, shared_heads: bool = True
) -> Callable[P, R]:
    """The rule, with arrays of a mesh of Explicit axes as well.

    Their types say how they are cut; so are the results. Other dimensions are gathered.

    Args:
      rule: as of `on_devices`, with its options.
      shared_heads: whether arrays of a single head, which others share, leave the state as it is.
    """
    signature = inspect.signature(rule)
    in_context = "context_axis" in signature.parameters

    @functools.wraps(rule)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        mesh = explicit_mesh((args, kwargs))
        if mesh is None:
            return rule(*args, **kwargs)
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        sizes = explicit_axes(mesh)
        arrays = [x for x in arguments.values() if getattr(x, "ndim", 0) >= 3]
        if not arrays:  # the rule says what is wrong
            return rule(*args, **kwargs)
        given = arguments.pop("context_axis", None)
        found = [axes_of(arrays, dimension, sizes) for dimension in range(3)]
        time = (given,) if given in sizes else found[1]
        heads = head_counts(arguments) if shared_heads else [x.shape[2] for x in arrays]
        cuts = Cuts(
            rows=fitting(found[0], sizes, arrays[0].shape[0]),
            time=fitting(time, sizes, arrays[0].shape[1]) if in_context else (),
            heads=fitting(found[2], sizes, *heads),
        )
        if len(cuts.time) > 1:
            cuts = cuts._replace(time=())
        whole: Any = rule
        return on_devices(whole, arguments, cuts, sizes, mesh)  # type: ignore[return-value]

    return run


def explicit_mesh(tree: Any) -> Mesh | AbstractMesh | None:
    """The mesh with Explicit axes that the arrays are of; None if they are of none."""
    ambient = jax.sharding.get_abstract_mesh()
    if ambient.axis_names and AxisType.Explicit not in ambient.axis_types:
        return None
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array):
            mesh = jax.typeof(x).sharding.mesh
            if AxisType.Explicit in mesh.axis_types:
                return mesh if isinstance(x, jax.core.Tracer) else _concrete(x.sharding)
    return None


def _concrete(sharding: Any) -> Mesh:
    mesh: Mesh = sharding.mesh
    return mesh


def explicit_axes(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Sizes of the Explicit axes."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Explicit}


def axes_of(arrays: Iterable[Any], dimension: int, sizes: dict[str, int]) -> Axes:
    """Explicit axes over which a dimension is cut: those of the first array where it is."""
    for x in arrays:
        if not isinstance(x, jax.Array) or x.shape[dimension] == 1:
            continue
        spec = jax.typeof(x).sharding.spec
        names = spec[dimension] if dimension < len(spec) else None
        axes = (names,) if isinstance(names, str) else tuple(names or ())
        if axes := tuple(name for name in axes if name in sizes):
            return axes
    return ()
