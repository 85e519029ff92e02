"""Equal layers stacked: the same state, the same step, fewer arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from mdn_jax import MDNForCausalLM
from tests.models.test_mixers import THREE
from tests.train.helpers import assert_identical
from train.config_sections import MeshConfig, OptimizerConfig
from train.freezing import frozen_mask, without_frozen
from train.initialize import abstract_state
from train.optimizer import make_optimizer, make_schedule
from train.parallel.sharding import make_mesh
from train.stacking import by_layer, equal_layers, groups_of, stacked, unstacked
from train.step import init_state, make_train_step, rounded

GROUPS = ((0, 2), (1,))
BATCH = {"tokens": np.arange(4)[:, None], "targets": np.ones((4, 1), np.int32)}
CONFIG = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, clip_norm=1e9)
SCHEDULE = make_schedule(CONFIG, 10)


def layer(seed, width):
    draw = np.random.default_rng(seed).normal
    kernels = {
        "q_proj": {"kernel": draw(size=(4, width))},
        "o_proj": {"kernel": draw(size=(width, 4))},
    }
    return jax.tree.map(jnp.float32, {"mixer": kernels, "norm": {"scale": draw(size=4)}})


def three_layers():
    """The first and the last are alike."""
    layers = {0: layer(0, 8), 1: layer(1, 6), 2: layer(2, 8)}
    return {
        "embeddings": jnp.float32(np.random.default_rng(3).normal(size=(4, 4))),
        "layers": layers,
    }


def loss(params, batch):
    h = params["embeddings"][batch["tokens"][:, 0]]
    for number in range(3):
        block = params["layers"][number]
        mixer = block["mixer"]
        h = (
            h
            + jnp.tanh(h * block["norm"]["scale"] @ mixer["q_proj"]["kernel"])
            @ mixer["o_proj"]["kernel"]
        )
    return jnp.sum(jnp.sin(h))


def states(frozen=None):
    """The same state by layer and stacked, and the steps of both."""
    params = three_layers()
    mask = frozen and frozen_mask(params, frozen)
    groups = equal_layers(params, mask)
    found = []
    for form, marks in (
        (params, mask),
        (stacked(params, groups), stacked(mask, groups, join=lambda xs: xs[0])),
    ):
        optimizer = without_frozen(make_optimizer(CONFIG, SCHEDULE), marks)
        step = make_train_step(loss, optimizer, SCHEDULE, frozen=marks, accumulation=2)
        found.append((init_state(jax.tree.map(jnp.copy, form), optimizer), step))
    return groups, found


@pytest.mark.parametrize("frozen", [None, ["layers.0.mixer"]])
def test_the_step_is_the_same_as_by_layer(frozen):
    groups, ((plain, plain_step), (state, step)) = states(frozen)
    assert groups == (GROUPS if frozen is None else ((0,), (1,), (2,)))
    assert groups_of(state) == groups
    assert_identical(by_layer(state), plain)
    for _ in range(3):
        plain, expected = plain_step(plain, BATCH)
        state, metrics = step(state, BATCH)
    assert_identical(by_layer(state), plain)
    assert float(metrics.loss) == float(expected.loss)
    np.testing.assert_allclose(metrics.grad_norm, expected.grad_norm, rtol=1e-6)
    assert metrics.grad_norms.keys() == expected.grad_norms.keys()
    for name, x in metrics.grad_norms.items():
        np.testing.assert_allclose(x, expected.grad_norms[name], rtol=1e-6, err_msg=name)


def test_there_and_back():
    params = three_layers()
    once = stacked(params, GROUPS)
    assert once["stacks"][0, 2]["mixer"]["q_proj"]["kernel"].shape == (2, 4, 8)
    assert len(jax.tree.leaves(once)) == len(jax.tree.leaves(params)) - 3
    for back in (by_layer(once), unstacked(once)):
        assert list(back["layers"]) == [0, 1, 2]
        assert_identical(back, params)
    assert_identical(by_layer(params), params)


def test_a_gradient_is_one_concatenation_a_stack():
    once = stacked(three_layers(), GROUPS)
    text = str(jax.make_jaxpr(jax.grad(lambda x: loss(unstacked(x), BATCH)))(once))
    assert text.count(" concatenate[") == len(jax.tree.leaves(once["stacks"][0, 2]))
    assert " pad[" not in text


def test_matrices_of_a_stack_are_rounded():
    low = rounded(stacked(three_layers(), GROUPS), jnp.bfloat16)["stacks"][0, 2]
    assert low["mixer"]["q_proj"]["kernel"].dtype == jnp.bfloat16
    assert low["norm"]["scale"].dtype == jnp.float32


def test_layers_of_one_kind_wherever_they_stand():
    model = nnx.eval_shape(lambda: MDNForCausalLM(THREE, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert equal_layers(params) == ((0,), (1,), (2,))
    params["layers"][2] = params["layers"][0]
    groups = equal_layers(params)
    assert groups == GROUPS
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    like = abstract_state(params, groups, make_optimizer(CONFIG, SCHEDULE), mesh)
    kernel = like.params["stacks"][0, 2]["mixer"]["o_proj"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    moments = by_layer(like).opt_state[1][0].mu
    assert moments["layers"].keys() == {0, 1, 2}
    one = moments["layers"][2]["mixer"]["o_proj"]["kernel"]
    assert one.shape == kernel.shape[1:]
    assert one.sharding.spec == PartitionSpec("tensor", "fsdp")
