import functools
from pathlib import Path

import jax
import pytest
from flax import nnx

from configs import CONFIGS, describe
from mdn_jax import MDNForCausalLM
from mdn_jax.layers import AttentionCache
from train.config import from_dict, to_dict
from train.config_sections import OptimizerConfig
from train.optimizer import decay_mask

PUBLISHED = [name for name in CONFIGS if name != "smoke"]


@functools.cache
def shapes(name):
    """The model without arrays."""
    return nnx.eval_shape(lambda: MDNForCausalLM(CONFIGS[name]().model, rngs=nnx.Rngs(0)))


def count(name):
    params = nnx.to_pure_dict(nnx.state(shapes(name), nnx.Param))
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
    large = name.endswith("1_3b")
    assert config.tokens_per_step == (1_048_576 if large else 524_288)
    assert config.steps == (102_400 if large else 30_720)


PARAMETERS = {
    "smoke": 398_360,
    "mdn_400m": 417_537_012,
    "hybrid_400m_3to1": 430_946_400,
    "hybrid_400m_7to1": 434_227_824,
    "gdn_400m": 417_278_460,
    "comba_400m": 417_278_712,
    "kda_400m": 424_384_704,
    "mamba2_400m": 419_778_048,
    "transformer_400m": 411_257_856,
    "mdn_1_3b": 1_462_646_004,
    "gdn_1_3b": 1_462_129_404,
    "comba_1_3b": 1_462_129_656,
    "kda_1_3b": 1_465_722_240,
    "mamba2_1_3b": 1_446_620_160,
    "transformer_1_3b": 1_439_078_400,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_counts(name):
    assert count(name) == PARAMETERS[name]


def test_the_table_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "mixers.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    table = {row[0].strip("`"): row for row in rows if row and row[0].strip("`") in CONFIGS}
    assert set(table) == set(CONFIGS) - {"smoke"}
    for name, (_, parameters, layers, heads, width, state) in table.items():
        model = CONFIGS[name]().model
        assert parameters == f"{PARAMETERS[name]:,}"
        assert layers == str(model.num_hidden_layers)
        assert heads == str(model.value_heads)
        attention = set(model.mixers) == {"attention"}
        assert width == ("64 / 64" if attention else f"{model.head_dim} / {model.head_v_dim}")
        cache = jax.eval_shape(lambda name=name: shapes(name).init_cache(1))
        fixed = [entry.state for entry in cache if not isinstance(entry, AttentionCache)]
        count = f"{sum(x.size for x in jax.tree.leaves(fixed)):,}" if fixed else "grows"
        assert state == count + (" and grows" if 0 < len(fixed) < len(cache) else "")


def test_hybrid_layers():
    for name, layers in (("3to1", (3, 7, 11, 15, 19, 23)), ("7to1", (7, 15, 23))):
        attention = CONFIGS[f"hybrid_400m_{name}"]().model.attn
        assert attention is not None
        assert attention.layers == layers
