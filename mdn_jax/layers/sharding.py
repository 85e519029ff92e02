"""What the layers say to the partitioner of `jax.jit` under a mesh, and the rule under one.

The mesh is the ambient one (`jax.set_mesh`). Rows are cut over its axes `data` and `fsdp`, heads
over `tensor`, as far as these axes are there, have more than one device and divide the dimension.
Without such axes nothing is said and nothing is paid.
"""

import math
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
    """`momentum_delta_rule` on each device's rows and heads.

    The partitioner cannot look into a GPU kernel and would gather all of its operands on every
    device; inside `jax.shard_map` each device calls it with what it holds.

    Args:
      *arrays: `q, k, v, log_alpha, log_mu, beta, eta` of the rule.
      p: as the rule's.
      initial_state: as the rule's.
      segment_ids: as the rule's.
      **options: its other arguments.
    """
    rows = cut(ROWS, arrays[0].shape[0])
    heads = [x.shape[2] for x in (*arrays, p) if x is not None]  # HV is a multiple of H
    head_axes = cut(HEADS, math.gcd(*heads))
    if rows is None and head_axes is None:
        return momentum_delta_rule(
            *arrays, p=p, initial_state=initial_state, segment_ids=segment_ids, **options
        )
    per_step, per_state = PartitionSpec(rows, None, head_axes), PartitionSpec(rows, head_axes)
    states = jax.tree.map(lambda _: per_state, initial_state)

    def rule(
        arrays: tuple[Array, ...], p: Array | None, state: MDNState, segment_ids: Array | None
    ) -> tuple[Array, MDNState]:
        return momentum_delta_rule(
            *arrays, p=p, initial_state=state, segment_ids=segment_ids, **options
        )

    return jax.shard_map(
        rule,
        in_specs=(per_step, per_step, states, PartitionSpec(rows)),
        out_specs=(per_step, states),
        axis_names=frozenset(partitioned()),
    )(arrays, p, initial_state, segment_ids)
