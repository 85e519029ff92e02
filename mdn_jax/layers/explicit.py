"""Layers and models on arrays of a mesh with Explicit axes, which `jax.make_mesh` gives.

There every operation has to say how its result is cut. A layer says it of its inputs and outputs
and leaves what is between to the partitioner, as on a mesh with Auto axes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from mdn_jax.layers.sharding import mesh_axes
from mdn_jax.ops.on_mesh import Cuts, axes_of, explicit_axes, explicit_mesh, fitting

Specs = Callable[[Any, Array, Any, Cuts, dict[str, int]], Any]
"""From a module, its first input, the cache given, the cuts and the sizes of axes: how its outputs
are cut."""


def under_explicit_meshes(specs: Specs) -> Callable[[Any], Any]:
    """For a method of a module, whose first argument is tokens `[B, T, ...]`.

    The type of the tokens says how rows and tokens are cut, that of the parameters how heads are.

    Args:
      specs: of the outputs.
    """

    def decorate(method: Any) -> Any:
        @functools.wraps(method)
        def run(module: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            mesh = explicit_mesh((args, kwargs))
            if mesh is None:
                return method(module, *args, **kwargs)
            graph, state = nnx.split(module)

            def call(state: Any, args: Any, kwargs: Any) -> Any:
                return method(nnx.merge(graph, state), *args, **kwargs)

            x, sizes = args[0], explicit_axes(mesh)
            cuts = Cuts(axes_of([x], 0, sizes), axes_of([x], 1, sizes), _heads(state, sizes))
            cache = kwargs.get("cache", args[2] if len(args) > 2 else None)
            outputs = specs(module, x, cache, cuts, sizes)
            return automatically(call, cuts, outputs, state, args, kwargs)

        return run

    return decorate


def automatically(function: Callable[..., Any], cuts: Cuts, specs: Any, *args: Any) -> Any:
    """Calls a function with the Explicit axes of its arguments left to the partitioner.

    Args:
      function: of `args`.
      cuts: which axes the layers in it cut rows, tokens and heads over.
      specs: how its outputs are cut, a `PartitionSpec` for each or for a subtree of them.
      *args: arrays and trees of them.
    """
    mesh = explicit_mesh(args)
    assert mesh is not None

    def call(*args: Any) -> Any:
        with mesh_axes(rows=cuts.rows, context=cuts.time, heads=cuts.heads):
            return function(*args)

    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    axes = tuple(explicit_axes(mesh))
    return jax.sharding.auto_axes(call, axes=axes, out_sharding=shardings)(*args)


def _heads(state: Any, sizes: dict[str, int]) -> tuple[str, ...]:
    """Axes over which the outputs of a query projection are cut."""
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if "q_proj.kernel" in jax.tree_util.keystr(path, simple=True, separator="."):
            return axes_of([x], 1, sizes)
    return ()


def tokens_and_cache(module: Any, x: Array, cache: Any, cuts: Cuts, sizes: dict[str, int]) -> Any:
    """Of an output `[B, T, ...]` and the cache: its rows are cut, and the heads of states."""

    def spec(y: jax.ShapeDtypeStruct) -> PartitionSpec:
        heads = fitting(cuts.heads, sizes, y.shape[1]) if y.ndim == 4 else ()
        return PartitionSpec(cuts.rows or None, heads or None)

    def of_layer(cache: Any) -> Any:
        if hasattr(cache, "state"):
            return jax.tree.map(spec, cache)
        return jax.tree.map(lambda _: PartitionSpec(cuts.rows or None), cache)

    if cache is None:
        cache = jax.eval_shape(lambda: module.init_cache(x.shape[0]))
    several = isinstance(cache, tuple) and not hasattr(cache, "state")
    specs = tuple(map(of_layer, cache)) if several else of_layer(cache)
    return of_tokens(module, x, None, cuts, sizes), specs


def of_tokens(
    module: Any, x: Array, cache: Any, cuts: Cuts, sizes: dict[str, int]
) -> PartitionSpec:
    """Of outputs `[B, T, ...]`."""
    del module, x, cache, sizes
    return PartitionSpec(cuts.rows or None, cuts.time or None)
