"""A hybrid model with rows, tokens and heads over devices is the model on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.layers import GatedDeltaNet2, MomentumDeltaNet
from mdn_jax.models import shard_model
from tests.mesh_program import report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results():
    return report("tests.models.mesh_runs")


@pytest.mark.parametrize("case", ["inside shard_map", "Explicit", "Auto"])
def test_many_devices_give_what_one_does(results, case):
    assert results[case]["outputs"] <= 1e-10
    assert results[case]["gradients"] <= 1e-9


def test_an_unknown_token_is_nan_to_the_end_of_its_document(results):
    assert results["unknown token"]["nan"] == [[0] * 16, [0] * 5 + [1] * 3 + [0] * 8]


def test_results_are_cut_as_the_tokens_are(results):
    assert results["Explicit, cut as"]["tokens"][:2] == ["x", "y"]


@pytest.fixture(scope="module")
def generated():
    return report("tests.models.generation_on_mesh")


def test_generation_over_devices_is_that_on_one(generated):
    """Rows lie over `data`, heads over `tensor`; the tokens are the same."""
    expected, actual = generated["one"], generated["data tensor"]
    assert actual["tokens"] == expected["tokens"]
    np.testing.assert_allclose(actual["numbers"], expected["numbers"], atol=1e-9)
    assert (expected["memory"], actual["memory"]) == ([4, 2, 4, 4], [2, 1, 4, 4])


def test_meshes_that_do_not_fit():
    model = MDNForCausalLM(
        MDNConfig(vocab_size=8, hidden_size=8, num_heads=1, head_dim=4), rngs=nnx.Rngs(0)
    )
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
    expected = "mesh: expected axes of type Auto among data, fsdp, tensor, got model Auto"
    with pytest.raises(ValueError, match=expected):
        shard_model(model, mesh)
    wide = AbstractMesh((2,), ("tensor",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="tensor that divides num_heads = 1, got 2"):
        shard_model(model, wide)


def test_what_has_no_stretches_says_so():
    config = MDNConfig(hidden_size=8, num_heads=1, head_dim=4)
    expected = r"context_axis: expected None for GatedDeltaNet2, got 'context'"
    with pytest.raises(ValueError, match=expected):
        GatedDeltaNet2(config, context_axis="context", rngs=nnx.Rngs(0))
    layer = MomentumDeltaNet(config, context_axis="context", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"context_axis: expected None or the name of a mesh axis"):
        layer(jnp.ones((1, 2, 8)))
