"""Equal layers of a training state, stacked along a leading axis.

A model of 21 layers has some 500 small arrays. The optimizer, the guard, the norms and the rounding
run over each of them, and their time is the number of their launches. So in the training state the
arrays of equal layers are one array. Two forms of every tree that has the names of parameters:

    {"embeddings": ..., "layers": {0: {...}, 1: {...}, 2: {...}}}        by layer
    {"embeddings": ..., "stacks": {(0, 2): {...}, (1,): {...}}}          stacked

A stack has the numbers of its layers as its key. The model, checkpoints and everything that a user
sees have the first form.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from mdn_jax.saved.model import Params

LAYERS, STACKS = "layers", "stacks"

Groups = tuple[tuple[int, ...], ...]
"""Numbers of the layers of each stack."""


def equal_layers(params: Params, frozen: Params | None = None) -> Groups:
    """Layers with the same names, shapes and dtypes, wherever they stand.

    Args:
      params: by layer, arrays or shapes.
      frozen: which of them stay as they are (`frozen_mask`): a stack is frozen as a whole.
    """
    kinds: dict[Any, list[int]] = {}
    for layer, arrays in params[LAYERS].items():
        leaves, names = jax.tree.flatten(arrays)
        marks = () if frozen is None else tuple(jax.tree.leaves(frozen[LAYERS][layer]))
        kind = names, tuple((x.shape, jnp.dtype(x.dtype)) for x in leaves), marks
        kinds.setdefault(kind, []).append(layer)
    return tuple(tuple(layers) for layers in kinds.values())


def stacked(
    tree: Any, groups: Groups, join: Callable[[Sequence[Any]], Any] = lambda xs: jnp.stack(xs)
) -> Any:
    """A tree by layer, such as parameters or a training state, as a stacked one.

    Args:
      tree: its dictionaries of parameters are by layer.
      groups: layers of each stack.
      join: makes one leaf of those of the layers.
    """

    def node(x: Any) -> Any:
        if not _has(LAYERS, x):
            return x
        stacks = {
            group: jax.tree.map(lambda *xs: join(xs), *(x[LAYERS][layer] for layer in group))
            for group in groups
        }
        return {name: y for name, y in x.items() if name != LAYERS} | {STACKS: stacks}

    return jax.tree.map(node, tree, is_leaf=functools.partial(_has, LAYERS))


def unstacked(tree: Any) -> Any:
    """A stacked tree by layer, to be traced; the gradient of a stack is one concatenation."""
    return _by_layer(tree, _slices)


def by_layer(tree: Any) -> Any:
    """A stacked tree by layer: of arrays, or of shapes with their shardings."""
    return _by_layer(tree, _pieces)


def groups_of(tree: Any) -> Groups:
    """Layers of each stack of a stacked tree."""
    trees = jax.tree.leaves(tree, is_leaf=functools.partial(_has, STACKS))
    return tuple(next(x[STACKS] for x in trees if _has(STACKS, x)))


def is_stacked(path: tuple[Any, ...]) -> bool:
    """Whether an array with this path in a tree has the leading axis of a stack."""
    return any(getattr(entry, "key", None) == STACKS for entry in path)


def _has(name: str, x: Any) -> bool:
    return isinstance(x, dict) and name in x


def _by_layer(tree: Any, split: Callable[[Any], Sequence[Any]]) -> Any:
    def node(x: Any) -> Any:
        if not _has(STACKS, x):
            return x
        layers = {}
        for group, arrays in x[STACKS].items():
            leaves, names = jax.tree.flatten(arrays)
            pieces = [split(leaf) for leaf in leaves]
            for place, layer in enumerate(group):
                layers[layer] = jax.tree.unflatten(names, [piece[place] for piece in pieces])
        ordered = dict(sorted(layers.items()))
        return {name: y for name, y in x.items() if name != STACKS} | {LAYERS: ordered}

    return jax.tree.map(node, tree, is_leaf=functools.partial(_has, STACKS))


def _slices(x: Array) -> list[Array]:
    # not x[i], whose gradient is an array of the whole stack for every layer, and their sum
    return [jnp.squeeze(part, 0) for part in lax.split(x, (1,) * x.shape[0], axis=0)]


def _pieces(x: Any) -> Sequence[Any]:
    sharding = _of_a_piece(x.sharding)
    if isinstance(x, jax.ShapeDtypeStruct):
        return [jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)] * x.shape[0]
    pieces: Sequence[Array] = _split_onto(sharding)(x)
    return pieces


@functools.cache  # for each array by itself: few shapes, few programs
def _split_onto(sharding: Sharding) -> Callable[[Array], list[Array]]:
    return jax.jit(_slices, out_shardings=sharding)


def _of_a_piece(sharding: Sharding) -> Sharding:
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
