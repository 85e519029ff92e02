"""A scan over stacked layers: the loss, the gradients and the steps of the layers one by one."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.errors import RunError
from mdn_jax.models import AttentionConfig
from tests.tiny import TINY_MODEL
from tests.train.helpers import random_batch
from train.config import TrainConfig
from train.config_sections import OptimizerConfig
from train.model_and_step import ModelAndStep
from train.scanning import scanned_loss
from train.stacking import by_layer, equal_layers, stacked
from train.step import split_model

TWO = MDNConfig(**TINY_MODEL | {"num_hidden_layers": 2})
SIX = dataclasses.replace(
    TWO, num_hidden_layers=6, attn=AttentionConfig(layers=(2, 5), num_heads=2)
)
"""Two momentum delta rules, then attention, twice: four layers in one stack, two in the other."""
UNEVEN = dataclasses.replace(SIX, attn=AttentionConfig(layers=(2,), num_heads=2))


def test_loss_and_gradients_are_those_of_the_layers():
    model = MDNForCausalLM(SIX, implementation="scan", remat="block", rngs=nnx.Rngs(3))
    loss, params = split_model(model)
    groups = equal_layers(params)
    batch = random_batch(1, 2, 9)
    expected, gradients = jax.jit(jax.value_and_grad(loss))(params, batch)
    scanned = jax.jit(jax.value_and_grad(scanned_loss(model, groups)))
    actual, found = scanned(stacked(params, groups), batch)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    by_name = jax.tree_util.tree_leaves_with_path(by_layer(found))
    for (path, x), y in zip(by_name, jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def run_of(config, **options):
    return TrainConfig(
        model=config,
        batch_size=4,
        accumulation=2,
        sequence_length=8,
        dtype="float32",
        implementation="scan",
        **options,
    ).resolved()


def test_steps_are_those_of_the_layers():
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, frozen=("layers.*.mlp",))
    batch, states, losses = random_batch(2, 4, 8), [], []
    for scan_layers in (False, True):
        run = ModelAndStep(run_of(TWO, scan_layers=scan_layers, optimizer=optimizer))
        with jax.set_mesh(run.mesh):
            state = run.initial_state()
            for _ in range(3):
                state, metrics = run.step(state, batch)
                losses.append(float(metrics.loss))
        states.append(state)
    np.testing.assert_allclose(losses[3:], losses[:3], rtol=1e-6)
    assert losses[2] < losses[0]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for x, y in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("config", "frozen"), [(UNEVEN, ()), (TWO, ("layers.0.mlp",))])
def test_layers_that_do_not_repeat_are_refused(config, frozen):
    layers = config.num_hidden_layers
    with pytest.raises(RunError, match=rf"scan_layers: expected layers that repeat.*got {layers} "):
        ModelAndStep(run_of(config, scan_layers=True, optimizer=OptimizerConfig(frozen=frozen)))
