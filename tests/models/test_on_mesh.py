"""A hybrid model with rows, tokens and heads over devices is the model on one."""

import jax.numpy as jnp
import pytest
from flax import nnx

from mdn_jax import MDNConfig
from mdn_jax.layers import GatedDeltaNet2, MomentumDeltaNet
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


def test_one_device_goes_on_from_what_many_have_read(results):
    found = results["a prompt read by many"]
    assert found["state"] <= 1e-10
    many, one = found["tokens"]
    assert many == one
    assert sum(map(len, one[-1])) > 0


def test_results_are_cut_as_the_tokens_are(results):
    assert results["Explicit, cut as"]["tokens"][:2] == ["x", "y"]


def test_what_has_no_stretches_says_so():
    config = MDNConfig(hidden_size=8, num_heads=1, head_dim=4)
    expected = r"context_axis: expected None for GatedDeltaNet2, got 'context'"
    with pytest.raises(ValueError, match=expected):
        GatedDeltaNet2(config, context_axis="context", rngs=nnx.Rngs(0))
    layer = MomentumDeltaNet(config, context_axis="context", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"context_axis: expected None or the name of a mesh axis"):
        layer(jnp.ones((1, 2, 8)))
