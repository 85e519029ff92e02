import jax
import pytest
from flax import nnx

from configs import CONFIGS, describe
from mdn_jax import MDNForCausalLM
from train.config import OptimizerConfig, from_dict, to_dict
from train.optimizer import decay_mask

PUBLISHED = [name for name in CONFIGS if name != "smoke"]


def count(config):
    model = nnx.eval_shape(lambda: MDNForCausalLM(config.model, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert any(jax.tree.leaves(decay_mask(params)))
    return sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_builds_and_round_trips(name):
    config = CONFIGS[name]()
    assert config.name == name
    assert describe(name)
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe(name):
    config = CONFIGS[name]()
    assert config.optimizer == OptimizerConfig()
    assert (config.dtype, config.sequence_length, config.seed) == ("bfloat16", 4096, 42)
    large = name == "mdn_1_3b"
    assert config.tokens_per_step == (1_048_576 if large else 524_288)
    assert config.steps == (102_400 if large else 30_720)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("smoke", (0.3, 0.6)),
        ("mdn_400m", (380, 460)),
        ("mdn_1_3b", (1250, 1550)),
        ("hybrid_400m_3to1", (360, 460)),
        ("hybrid_400m_7to1", (360, 460)),
    ],
)
def test_parameter_counts(name, millions):
    assert millions[0] < count(CONFIGS[name]()) / 1e6 < millions[1]


def test_hybrid_layers():
    for name, layers in (("3to1", (3, 7, 11, 15, 19, 23)), ("7to1", (7, 15, 23))):
        attention = CONFIGS[f"hybrid_400m_{name}"]().model.attn
        assert attention is not None
        assert attention.layers == layers
