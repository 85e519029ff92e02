"""Models whose parameters lie over the devices of a mesh."""

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mdn_jax.layers.partition import of_parameter
from mdn_jax.layers.sharding import HEADS, ROWS
from mdn_jax.models.causal_lm import MDNForCausalLM
from mdn_jax.models.config import MDNConfig


def shard_model(model: MDNForCausalLM, mesh: Mesh) -> MDNForCausalLM:
    """The model with its parameters over a mesh, for generation.

    Heads and the width of the MLP are cut over the axis `tensor`, the width of the residual stream
    over `fsdp`; `data` and `fsdp` cut the rows of a batch, and `data` alone leaves the parameters
    whole on each device. What an axis does not divide lies whole. `generate`, `stream`, `prefill`
    and `Decoder` find the mesh from the parameters.

    Args:
      model: the model; it stays as it is.
      mesh: with some of these axes, of type Auto.

    Raises:
      ValueError: a mesh that does not fit, by name.
    """
    known = (*ROWS, *HEADS)
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if not set(kinds) <= set(known) or set(kinds.values()) != {AxisType.Auto}:
        got = ", ".join(f"{name} {kind.name}" for name, kind in kinds.items())
        raise ValueError(f"mesh: expected axes of type Auto among {', '.join(known)}, got {got}")
    parts = math.prod(mesh.shape.get(name, 1) for name in HEADS)
    for name, size in tensor_sizes(model.config).items():
        if size % parts:
            raise ValueError(
                f"mesh: expected an axis tensor that divides {name} = {size}, got {parts}"
            )
    graph, state = nnx.split(model)

    def place(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        spec = of_parameter(jax.tree_util.keystr(path[:-1], simple=True, separator="."))
        return jax.device_put(x, NamedSharding(mesh, _fitting(spec, x.shape, mesh)))

    placed: MDNForCausalLM = nnx.merge(graph, jax.tree_util.tree_map_with_path(place, state))
    return placed


def mesh_of(arrays: list[jax.Array]) -> Mesh | None:
    """The mesh over which parameters lie; None: they lie on one device, or it is none."""
    for x in arrays:
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh if isinstance(sharding.mesh, Mesh) else None
    return None


def tensor_sizes(config: MDNConfig) -> dict[str, int]:
    """What the axis `tensor` has to divide, by the names of the configuration's fields."""
    sizes = {"mlp_width": config.mlp_width}
    if set(config.mixers) != {"attention"}:
        # groups of one are shared by all heads
        many = config.num_heads > 1 or config.value_heads == 1
        sizes |= {"num_heads": config.num_heads} if many else {"num_v_heads": config.value_heads}
    if "attention" in config.mixers:
        attention = config.attention  # the query heads are a multiple
        sizes |= {"attn.num_kv_heads": attention.num_kv_heads or attention.num_heads}
    return sizes


def _fitting(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The axes that the mesh has and that divide their dimensions."""
    cuts: list[tuple[str, ...] | None] = []
    for axes, size in zip(spec, shape, strict=False):
        names = (axes,) if isinstance(axes, str) else axes or ()
        there = tuple(name for name in names if name in mesh.shape)
        fits = there and size % math.prod(mesh.shape[name] for name in there) == 0
        cuts.append(there if fits else None)
    return PartitionSpec(*cuts)
