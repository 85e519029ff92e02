"""Operations counted against numbers written out by hand."""

import pytest
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.models import AttentionConfig
from train.metrics.flops import flops_per_token, projection_sizes, utilisation
from train.step import split_model

MODEL = MDNConfig(
    vocab_size=100,
    hidden_size=16,
    num_hidden_layers=2,
    num_heads=2,
    head_dim=4,
    expand_v=2.0,
    intermediate_size=24,
)
# q, k of 8, v, gate and output of 16; four gates of 2 heads; three matrices of the MLP
BLOCK = 16 * (8 + 8 + 16 + 16 + 16 + 4 * 2 + 3 * 24)


def parameters(config):
    return split_model(nnx.eval_shape(lambda: MDNForCausalLM(config, rngs=nnx.Rngs(0))))[1]


def test_products_with_weights_and_states():
    params = parameters(MODEL)
    assert projection_sizes(params) == 2 * BLOCK
    states = 2 * 2 * 12 * 4 * 8  # layers, heads
    expected = 3 * (2 * (2 * BLOCK + 16 * 100) + states)
    assert flops_per_token(MODEL, params, 64) == expected


@pytest.mark.parametrize(("window", "seen"), [(None, (1 + 64) / 2), (4, 4 - 6 / 64)])
def test_attention_sees_the_tokens_before(window, seen):
    attention = AttentionConfig(layers=(1,), num_heads=4, window_size=window)
    config = MDNConfig(**{**MODEL.to_dict(), "attn": attention})
    params = parameters(config)
    block = 16 * (4 * 16 + 3 * 24)
    weights = BLOCK + block + 16 * 100
    expected = 3 * (2 * weights + 2 * 12 * 4 * 8 + 4 * seen * 16)
    assert flops_per_token(config, params, 64) == pytest.approx(expected)


def test_other_mixers():
    for mixer, state in (("gdn", 6), ("comba", 6), ("attention", 0)):
        config = MDNConfig(**{**MODEL.to_dict(), "mixer": mixer})
        params = parameters(config)
        gates = 0 if mixer == "attention" else 2 * 2
        widths = 4 * 16 if mixer == "attention" else 8 + 8 + 16 + 16 + 16
        weights = 2 * 16 * (widths + gates + 3 * 24) + 16 * 100
        seen = 2 * 4 * (1 + 64) / 2 * 16 if mixer == "attention" else 0
        expected = 3 * (2 * weights + 2 * 2 * state * 4 * 8 + seen)
        assert flops_per_token(config, params, 64) == pytest.approx(expected)


def test_utilisation():
    assert utilisation(4 * 98.94e12, "NVIDIA H100 80GB HBM3", 4) == pytest.approx(0.1)
    assert utilisation(1e12, "cpu") is None
