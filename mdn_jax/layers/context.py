"""Where the tokens of a row are cut over devices: what a layer needs of the stretches before."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

from mdn_jax.ops.context import context_size, continues, from_previous, varying
from mdn_jax.ops.inputs import document_numbers


def inside_shard_map(axis: str | None) -> bool:
    """Whether a surrounding `jax.shard_map` has the axis, so that arrays are one device's.

    False for None, and for an axis that the partitioner of `jax.jit` has: arrays are whole then.

    Raises:
      ValueError: the ambient mesh has no such axis.
    """
    if axis is None:
        return False
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if kinds.get(axis, AxisType.Manual) != AxisType.Manual:
        return False
    context_size(axis)
    return True


def differing[Module: nnx.Module](module: Module, x: Array) -> Module:
    """The module with parameters as they differ over the mesh axes that `x` differs over.

    For one with a backward pass of its own, which gives each device's part of their gradients;
    `jax.shard_map` adds these up.
    """
    if not jax.typeof(x).manual_axis_type.varying:
        return module
    graph, state = nnx.split(module)
    return nnx.merge(graph, varying(state, x))


def check_stretch(lengths: Array | None, axis: str | None) -> None:
    """Raises ValueError for padded rows that are cut over devices."""
    if lengths is not None and axis is not None and inside_shard_map(axis):
        raise ValueError(f"lengths: expected None with context_axis = {axis!r}, got an array")


def entering_tails(
    inputs: tuple[Array, ...],
    tails: tuple[Array | None, ...],
    axis: str,
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[Array | None, ...]:
    """The last inputs before a stretch, for short convolutions.

    Args:
      inputs: of each convolution, `[B, T, channels]`, this device's stretch.
      tails: the inputs before the whole row, `[B, W, channels]`; None: not convolved.
      axis: mesh axis over which the tokens are cut.
      segment_ids: document of each step of the stretch.

    Returns:
      The last `W` inputs before the stretch that are of the document of its first step, zeros on
      the left; on the axis' first device the tails as given. In the dtype of the inputs.

    Raises:
      ValueError: a stretch below `W` steps.
    """
    sizes = {tail.shape[1] for tail in tails if tail is not None}
    length = inputs[0].shape[1]
    if sizes and length < max(sizes):
        raise ValueError(
            f"x: expected at least {max(sizes)} steps (conv_size) on each device of "
            f"context_axis = {axis!r}, got {length}"
        )
    same = None if segment_ids is None else continues(segment_ids, axis)
    first = lax.axis_index(axis) == 0

    def entering(x: Array, given: Array | None) -> Array | None:
        if given is None:
            return None
        size = given.shape[1]
        before = from_previous(_of_last_document(x[:, -size:], segment_ids), axis)
        if same is not None:
            before = jnp.where(same[:, None, None], before, 0)
        return jnp.where(first, given.astype(x.dtype), before)

    return tuple(map(entering, inputs, tails))


def _of_last_document(
    x: Float[Array, "B W channels"], segment_ids: Int[Array, "B T"] | None
) -> Float[Array, "B W channels"]:
    if segment_ids is None:
        return x
    numbers = document_numbers(segment_ids[:, -x.shape[1] :], (x.shape[0], x.shape[1]))
    return jnp.where((numbers == numbers[:, -1:])[:, :, None], x, 0)


def whole_rows[Tree](tree: Tree, axis: str) -> Tree:
    """`[B, T, ...]` of every stretch, one behind the other: `[B, devices * T, ...]`."""
    return jax.tree.map(lambda x: lax.all_gather(x, axis, axis=1, tiled=True), tree)


def own_stretch[Tree](tree: Tree, axis: str, length: int) -> Tree:
    """This device's `length` steps of whole rows."""
    start = lax.axis_index(axis) * length
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, length, axis=1), tree)


def numbered_documents(segment_ids: Int[Array, "B T"], axis: str | None) -> Int[Array, "B T"]:
    """The documents of the rows counted from 0, also over the stretches of an axis."""
    shape = (segment_ids.shape[0], segment_ids.shape[1])
    if axis is None:
        return document_numbers(segment_ids, shape)
    whole = whole_rows(segment_ids, axis)
    numbers = document_numbers(whole, (whole.shape[0], whole.shape[1]))
    return own_stretch(numbers, axis, shape[1])
