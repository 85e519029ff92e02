"""What the layers say to the partitioner of `jax.jit` under a mesh, and the rule under one.

The mesh is the ambient one (`jax.set_mesh`). Rows are cut over its axes `data` and `fsdp`, heads
over `tensor`, as far as these axes are there, have more than one device and divide the dimension.
Without such axes nothing is said and nothing is paid.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from mdn_jax.ops.api import momentum_delta_rule
from mdn_jax.ops.state import MDNState

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
ROWS, HEADS = (DATA, FSDP), (TENSOR,)


def partitioned() -> dict[str, int]:
    """Axes of the ambient mesh that the partitioner has, not a surrounding `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {name: mesh.shape[name] for name, kind in kinds.items() if kind == AxisType.Auto}


def cut(axes: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """Those of the axes that a dimension is cut over; all that there are, or none."""
    there = {name: n for name, n in partitioned().items() if name in axes and n > 1}
    return tuple(there) if there and size % math.prod(there.values()) == 0 else None


def constrain(x: Array, *dimensions: tuple[str, ...]) -> Array:
    """`x` with its first dimensions cut over these axes and no other dimension cut.

    Args:
      x: any array, at least as many dimensions as named; as it is outside of a mesh.
      *dimensions: `ROWS`, `HEADS` or `()` for each dimension from the first.
    """
    if math.prod(partitioned().get(name, 1) for name in AXES) == 1:
        return x
    cuts = (cut(axes, size) for axes, size in zip(dimensions, x.shape, strict=False))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*cuts))


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
    return sharded_rule(
        momentum_delta_rule,
        **dict(zip(names, arrays, strict=True)),
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
    **arguments: Any,
) -> tuple[Array, State]:
    """A rule on each device's rows and heads.

    The partitioner cannot look into a GPU kernel and would gather all of its operands on every
    device; inside `jax.shard_map` each device calls it with what it holds.

    Args:
      rule: function of arrays `[B, T, heads, ...]` by name, `initial_state` `[B, HV, ...]` and
        `segment_ids` `[B, T]`, to an output and a state of the same axes.
      initial_state: as the rule's.
      segment_ids: as the rule's.
      **arguments: its arrays and its options. A single head that others share goes to all devices.
    """
    arrays = {name: x for name, x in arguments.items() if getattr(x, "ndim", 0) >= 3}
    options = {name: x for name, x in arguments.items() if name not in arrays}
    rows = cut(ROWS, next(iter(arrays.values())).shape[0])
    heads = [x.shape[2] for x in arrays.values() if x.shape[2] > 1]  # HV is a multiple of H
    head_axes = cut(HEADS, math.gcd(*heads) if heads else 1)
    if rows is None and head_axes is None:
        return rule(**arrays, initial_state=initial_state, segment_ids=segment_ids, **options)
    per_step, per_state = PartitionSpec(rows, None, head_axes), PartitionSpec(rows, head_axes)
    cuts = {name: per_step if x.shape[2] > 1 else PartitionSpec(rows) for name, x in arrays.items()}
    states = jax.tree.map(lambda _: per_state, initial_state)

    def run(
        arrays: dict[str, Array], state: State, segment_ids: Array | None
    ) -> tuple[Array, State]:
        return rule(**arrays, initial_state=state, segment_ids=segment_ids, **options)

    return jax.shard_map(
        run,
        in_specs=(cuts, states, PartitionSpec(rows)),
        out_specs=(per_step, states),
        axis_names=frozenset(partitioned()),
    )(arrays, initial_state, segment_ids)


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
    rows = cut(ROWS, arrays[0].shape[0])
    channels = cut(HEADS, math.gcd(*(x.shape[-1] for x in arrays)))
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
    )(arguments, starts)
