"""The kernels lower for a mesh of GPUs: tokens cut over an axis, and arrays of Explicit axes."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, use_abstract_mesh

from mdn_jax import momentum_delta_rule
from pallas_kernels.target import target_gpu

KERNELS = ("intra_chunk_fwd", "state_fwd", "output_fwd", "state_bwd", "gate_bwd")


def shapes():
    keys = jax.ShapeDtypeStruct((2, 128, 2, 16), jnp.bfloat16)
    per_step = jax.ShapeDtypeStruct((2, 128, 2), jnp.float32)
    gates = dict.fromkeys(("log_alpha", "log_mu", "beta", "eta"), per_step)
    return dict.fromkeys("qkv", keys) | gates


def lowered(rule, x):
    def loss(x):
        o, state = rule(x)
        return jnp.sum(o.astype(jnp.float32)), (o, state)

    traced = jax.jit(jax.grad(loss, has_aux=True)).trace(x)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.slow
def test_tokens_over_an_axis():
    """A stretch's map is found beside its states: no kernel of a chunk runs twice."""
    tokens = PartitionSpec("data", "context")
    with target_gpu((9, 0), {"data": 2, "context": 2}):
        rule = jax.shard_map(
            lambda x: momentum_delta_rule(**x, context_axis="context"),
            in_specs=(tokens,),
            out_specs=(tokens, PartitionSpec("data")),
        )
        text = lowered(rule, shapes())
    assert "all_gather" in text
    walks = ("state_fwd_ends", "state_fwd_ends_again", "state_bwd_starts")
    counts = {name: len(re.findall(rf"mdn_{name}\b", text)) for name in (*KERNELS, *walks)}
    once = counts["gate_bwd"]  # a call has its name in several places
    assert once
    assert set(counts.values()) == {once}, counts


@pytest.mark.slow
def test_explicit_axes():
    cut = PartitionSpec("rows", None, "heads")
    with target_gpu((9, 0), {"rows": 2, "heads": 2}):
        automatic = jax.sharding.get_abstract_mesh()
    mesh = automatic.update(axis_types=(AxisType.Explicit,) * 2)
    with use_abstract_mesh(mesh):
        x = jax.tree.map(
            lambda y: jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=NamedSharding(mesh, cut)),
            shapes(),
        )
        text = lowered(lambda x: momentum_delta_rule(**x), x)
    assert "all_gather" not in text
    assert all(f"mdn_{name}" in text for name in KERNELS)


@pytest.mark.slow
def test_rows_in_pieces_over_an_axis():
    x = {
        name: jax.ShapeDtypeStruct((y.shape[0], 2**17, *y.shape[2:]), y.dtype)
        for name, y in shapes().items()
    }
    rows = PartitionSpec("data")
    with target_gpu((9, 0), {"data": 2}):
        rule = jax.shard_map(lambda x: momentum_delta_rule(**x), in_specs=(rows,), out_specs=rows)
        text = lowered(rule, x)
    assert all(f"mdn_{name}" in text for name in (*KERNELS, "piece_link", "piece_link_back"))
