"""What the layers say to the partitioner of `jax.jit` under a mesh, and the rule under one.

The mesh is the ambient one (`jax.set_mesh`). Rows are cut over its axes `data` and `fsdp`, tokens
over `context`, heads over `tensor` (`mesh_axes` names others), as far as these axes are there, have
more than one device and divide the dimension. Without such axes nothing is said and nothing is
paid.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from mdn_jax.ops.api import momentum_delta_rule
from mdn_jax.ops.on_mesh import Cuts, fitting, head_counts, on_devices, types_are_checked
from mdn_jax.ops.rowwise import Places
from mdn_jax.ops.state import MDNState

DATA, FSDP, CONTEXT, TENSOR = "data", "fsdp", "context", "tensor"
ROWS, HEADS = (DATA, FSDP), (TENSOR,)

_NAMES = Cuts(ROWS, (CONTEXT,), HEADS)

_axes: ContextVar[Cuts] = ContextVar("mesh_axes", default=_NAMES)


@contextmanager
def mesh_axes(
    *,
    rows: tuple[str, ...] = ROWS,
    context: tuple[str, ...] = (CONTEXT,),
    heads: tuple[str, ...] = HEADS,
) -> Iterator[None]:
    """Within it, layers are traced for a mesh whose axes have these names.

    It matters where axes are of type Auto: there the types of arrays do not say how they are cut.
    Names decide what each device computes and what is sent, never the result.

    Args:
      rows: axes over which the rows of a batch are cut.
      context: axis over which the tokens of a row are cut.
      heads: axes over which heads are cut.
    """
    token = _axes.set(Cuts(tuple(rows), tuple(context), tuple(heads)))
    try:
        yield
    finally:
        _axes.reset(token)


def named_axes() -> Cuts:
    """Names of the axes over which rows, tokens and heads are cut."""
    return _axes.get()


def partitioned() -> dict[str, int]:
    """Axes of the ambient mesh that the partitioner has, not a surrounding `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {name: mesh.shape[name] for name, kind in kinds.items() if kind == AxisType.Auto}


def cut(axes: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """Those of the axes that a dimension is cut over; all that there are, or none."""
    return fitting(axes, partitioned(), size) or None


def heads_are_cut() -> bool:
    """Whether the partitioner has more than one device on an axis of heads."""
    return any(partitioned().get(name, 1) > 1 for name in named_axes().heads)


def token_places(x: Array) -> Places:
    """Where activations `[B, T, D]` or `[B, T, heads, D]` lie, for kernels along their rows.

    Those without heads lie as `shared_tokens` says.
    """
    sizes, names = partitioned(), named_axes()
    cuts = Cuts(
        rows=fitting(names.rows, sizes, x.shape[0]),
        time=fitting(names.time, sizes, x.shape[1]) if x.ndim == 4 else _stream_time(x),
        heads=fitting(names.heads, sizes, x.shape[2]) if x.ndim == 4 else (),
    )
    return Places(cuts, frozenset(sizes))


def shared_tokens(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Activations of the residual stream: devices that share heads have each a part of the tokens.

    So norms and sums are done once, and products over heads or the MLP's width end in a sum of
    which each device takes its part. Of the gradient all have all tokens again.
    """
    return _between(True, x) if heads_are_cut() else x


def all_tokens(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The same before such products: devices that share heads have the same tokens.

    Gathered once: the partitioner would rather gather every matrix, and exchange what each of the
    products gives. Of the gradient each device takes its part.
    """
    return _between(False, x) if heads_are_cut() else x


def embedded_tokens(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Rows of a table whose width is cut, as activations of the residual stream.

    In two exchanges, one over the axes of rows and one over those of heads; for both at once the
    partitioner would gather all of them.
    """
    if not heads_are_cut():
        return x
    names, sizes = named_axes(), partitioned()
    rows, width = cut(names.rows, x.shape[0]), cut(names.heads, x.shape[2])
    time = fitting(names.time, sizes, x.shape[1]) or None
    return shared_tokens(jax.lax.with_sharding_constraint(x, PartitionSpec(rows, time, width)))


def all_ids(ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Ids of tokens or documents, the same on devices that share heads, before they are used."""
    if not heads_are_cut():
        return ids
    time = fitting(named_axes().time, partitioned(), ids.shape[1]) or None
    rows = cut(named_axes().rows, ids.shape[0])
    return jax.lax.with_sharding_constraint(ids, PartitionSpec(rows, time))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _between(shared: bool, x: Array) -> Array:
    return _placed(shared, x)


def _placed(shared: bool, x: Array) -> Array:
    time = _stream_time(x) if shared else fitting(named_axes().time, partitioned(), x.shape[1])
    rows = cut(named_axes().rows, x.shape[0])
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows, time or None, None))


_between.defvjp(
    lambda shared, x: (_placed(shared, x), None),
    lambda shared, _, gradient: (_placed(not shared, gradient),),
)


def _stream_time(x: Array) -> tuple[str, ...]:
    names, sizes = named_axes(), partitioned()
    length = x.shape[1]
    return fitting(names.time + names.heads, sizes, length) or fitting(names.time, sizes, length)


def sharded_momentum_delta_rule(
    *arrays: Array,
    p: Array | None = None,
    initial_state: MDNState,
    segment_ids: Array | None = None,
    **options: Any,
) -> tuple[Array, MDNState]:
    """`momentum_delta_rule` on each device's rows and heads, see `sharded_rule`.

    Args:
      *arrays: `q, k, v, log_alpha, log_mu, beta, eta` of the rule.
      p: as the rule's.
      initial_state: as the rule's.
      segment_ids: as the rule's.
      **options: its other arguments.
    """
    names = ("q", "k", "v", "log_alpha", "log_mu", "beta", "eta")
    named: dict[str, Any] = dict(zip(names, arrays, strict=True))
    return sharded_rule(
        momentum_delta_rule,
        **named,
        p=p,
        initial_state=initial_state,
        segment_ids=segment_ids,
        **options,
    )


def sharded_rule[State](
    rule: Callable[..., tuple[Array, State]],
    *,
    initial_state: State,
    segment_ids: Array | None = None,
    context_axis: str | None = None,
    **arguments: Any,
) -> tuple[Array, State]:
    """A rule on each device's rows, tokens and heads.

    Args:
      rule: function of arrays `[B, T, heads, ...]` by name, `initial_state` `[B, HV, ...]` and
        `segment_ids` `[B, T]`, to an output and a state of the same axes.
      initial_state: as the rule's.
      segment_ids: as the rule's.
      context_axis: mesh axis over which tokens are cut, in place of that of `mesh_axes`; of a
        surrounding `jax.shard_map`, or one that the partitioner has.
      **arguments: its arrays and its options. A single head that others share goes to all devices.
    """
    arguments |= {"initial_state": initial_state, "segment_ids": segment_ids}
    sizes, names = partitioned(), named_axes()
    if context_axis in sizes:
        names = names._replace(time=(context_axis,))
    elif context_axis is not None:
        arguments["context_axis"] = context_axis
    in_context = "context_axis" in inspect.signature(rule).parameters
    batch, length = next(x.shape for x in arguments.values() if getattr(x, "ndim", 0) >= 3)[:2]
    cuts = Cuts(
        rows=fitting(names.rows, sizes, batch),
        time=fitting(names.time, sizes, length) if in_context else (),
        heads=fitting(names.heads, sizes, *head_counts(arguments)),
    )
    if cuts == Cuts():
        return rule(**arguments)
    return on_devices(rule, arguments, cuts, sizes)


def by_rows_and_channels[Arguments](
    function: Callable[[Any, Array | None], tuple[Array, ...]],
    arguments: Arguments,
    starts: Array | None,
) -> tuple[Array, ...]:
    """A function of each channel by itself, on each device's rows and channels (`sharded_rule`).

    Args:
      function: of `arguments` and `starts` `[B, T]`, to outputs `[B, T, channels]`.
      arguments: a pytree of `[B, steps, channels]`, `[taps, channels]` and `[channels]`.
      starts: goes to all channels.
    """
    arrays = jax.tree.leaves(arguments)
    rows = cut(named_axes().rows, arrays[0].shape[0])
    channels = cut(named_axes().heads, math.gcd(*(x.shape[-1] for x in arrays)))
    if rows is None and channels is None:
        return function(arguments, starts)
    by_rank = {
        3: PartitionSpec(rows, None, channels),
        2: PartitionSpec(None, channels),
        1: PartitionSpec(channels),
    }
    return jax.shard_map(
        function,
        in_specs=(jax.tree.map(lambda x: by_rank[x.ndim], arguments), PartitionSpec(rows)),
        out_specs=by_rank[3],
        axis_names=frozenset(partitioned()),
        check_vma=types_are_checked(arguments),
    )(arguments, starts)
