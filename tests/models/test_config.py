"""Reading and writing published configurations; every message of a bad one."""

import dataclasses
import json

import pytest

from mdn_jax import MDNConfig
from mdn_jax.models import AttentionConfig
from tests.models.published import HYBRID_3_TO_1, MDN_1B, MDN_400M, PUBLISHED


def contains(whole, part):
    if isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    return whole == part and type(whole) is type(part)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_round_trip(name):
    config = MDNConfig.from_dict(PUBLISHED[name])
    back = config.to_dict()
    assert contains(back, PUBLISHED[name])
    assert MDNConfig.from_dict(back) == config
    assert MDNConfig.from_dict(json.loads(json.dumps(back))) == config
    assert MDNConfig.from_dict(back).to_dict() == back
    assert "extras" not in back
    hash(config)


def test_published_sizes():
    small, large = MDNConfig.from_dict(MDN_400M), MDNConfig.from_dict(MDN_1B)
    assert (small.key_dim, small.value_dim, small.head_v_dim, small.mlp_width) == (
        768,
        1536,
        256,
        2816,
    )
    assert (large.key_dim, large.value_dim, large.head_v_dim, large.mlp_width) == (
        1536,
        3072,
        512,
        5632,
    )
    assert (large.tau_factor, large.min_log_mu) == (8, -1.0)
    hybrid = MDNConfig.from_dict(HYBRID_3_TO_1)
    assert [i for i in range(24) if hybrid.is_attention(i)] == [3, 7, 11, 15, 19, 23]
    assert not small.is_attention(3)
    assert hybrid.attn == AttentionConfig(layers=(3, 7, 11, 15, 19, 23), num_heads=8)


def test_derived_sizes():
    config = MDNConfig(num_heads=2, num_v_heads=6, head_dim=16, expand_v=1.5)
    assert (config.value_heads, config.head_v_dim, config.gate_rank) == (6, 24, 24)
    assert (config.key_dim, config.value_dim) == (32, 144)
    assert MDNConfig(num_heads=3).value_heads == 3
    assert MDNConfig(lora_gate_rank=5).gate_rank == 5
    assert MDNConfig(intermediate_size=100).mlp_width == 100
    assert (
        MDNConfig(hidden_size=64).mlp_width
        == MDNConfig(hidden_size=64, hidden_ratio=None).mlp_width
    )
    assert MDNConfig(hidden_size=96, hidden_ratio=4).mlp_width == 256
    assert MDNConfig(hidden_size=97, hidden_ratio=4).mlp_width == 512


@pytest.mark.parametrize(
    ("published", "words"),
    [
        ({"hiden_size": 3}, ["hiden_size", "unknown", "hidden_size"]),
        ({"use_l2_warp": False}, ["use_l2_warp", "use_l2warp"]),
        ({"extras": ()}, ["extras", "unknown"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'swish' or 'silu'", "'gelu'"]),
        ({"use_l2warp": True}, ["use_l2warp", "False", "True"]),
        ({"allow_neg_eigval": True}, ["allow_neg_eigval", "False", "True"]),
        ({"model_type": "gated_deltanet"}, ["model_type", "momentum_deltanet", "gated_deltanet"]),
        ({"attn_mode": "parallel"}, ["attn_mode", "chunk", "parallel"]),
        ({"fuse_norm": "yes"}, ["fuse_norm", "bool", "'yes'"]),
        ({"eos_token_id": 1.5}, ["eos_token_id", "token id", "1.5"]),
        ({"attn": {"num_heads": 2}}, ["attn.layers", "a value"]),
        ({"attn": {"layers": [0]}}, ["attn.num_heads", "a value"]),
        (
            {"attn": {"layers": [0], "num_heads": 2, "window": 3}},
            ["attn.window", "attn.window_size"],
        ),
        ({"attn": {"layers": 3, "num_heads": 2}}, ["attn.layers", "tuple", "3"]),
        ({"attn": {"layers": [99], "num_heads": 2}}, ["attn.layers", "= 21", "99"]),
        ({"attn": {"layers": [-1], "num_heads": 2}}, ["attn.layers", ">= 0", "-1"]),
        ({"attn": {"layers": [0], "num_heads": 0}}, ["attn.num_heads", ">= 1", "0"]),
        ({"attn": {"layers": [0], "num_heads": 3}}, ["attn.num_heads", "even", "2048", "3"]),
        (
            {"attn": {"layers": [0], "num_heads": 4, "num_kv_heads": 3}},
            ["attn.num_kv_heads", "divisor", "3"],
        ),
        ({"attn": {"layers": [0], "num_heads": 4, "qkv_bias": 1}}, ["attn.qkv_bias", "bool", "1"]),
        (
            {"attn": {"layers": [0], "num_heads": 4, "window_size": 0}},
            ["attn.window_size", ">= 1", "0"],
        ),
        (
            {"attn": {"layers": [0], "num_heads": 4, "rope_theta": 0}},
            ["attn.rope_theta", "> 0", "0"],
        ),
        ({"attn": 3}, ["attn", "AttentionConfig", "3"]),
        ({"vocab_size": 0}, ["vocab_size", ">= 1", "0"]),
        ({"hidden_size": "wide"}, ["hidden_size", "int", "'wide'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", ">= 1", "0"]),
        ({"num_heads": True}, ["num_heads", "int", "True"]),
        ({"num_v_heads": 7}, ["num_v_heads", "multiple of num_heads = 6", "7"]),
        ({"conv_size": 0}, ["conv_size", ">= 1", "0"]),
        ({"expand_v": 1.3, "head_dim": 16}, ["expand_v", "integer", "16", "1.3"]),
        ({"expand_v": -1}, ["expand_v", "> 0", "-1"]),
        ({"use_gate": 1}, ["use_gate", "bool", "1"]),
        ({"lora_gate_rank": 0}, ["lora_gate_rank", ">= 1", "0"]),
        ({"intermediate_size": 2.5}, ["intermediate_size", "int", "2.5"]),
        ({"min_log_mu": 0.5}, ["min_log_mu", "<= 0", "0.5"]),
        ({"tau_factor": 0}, ["tau_factor", "> 0", "0"]),
        ({"hidden_ratio": 0}, ["hidden_ratio", "> 0", "0"]),
        ({"norm_eps": 0.0}, ["norm_eps", "> 0", "0.0"]),
        ({"initializer_range": float("nan")}, ["initializer_range", "nan"]),
        ({"expand_v": 3e307}, ["expand_v", "float32", "3e+307"]),
        ({"expand_v": float("inf")}, ["expand_v", "float32", "inf"]),
        ({"expand_v": 1e12}, ["expand_v", "at most 2147483647", "1000000000000.0"]),
        ({"head_dim": 2**31 - 1, "num_heads": 2}, ["num_heads * head_dim", "at most 2147483647"]),
        ({"hidden_ratio": 2e308}, ["hidden_ratio", "float32", "inf"]),
        ({"hidden_ratio": float("nan")}, ["hidden_ratio", "float32", "nan"]),
        ({"hidden_ratio": 7e20}, ["hidden_ratio", "at most 2147483647", "7e+20"]),
        ({"hidden_ratio": 1e-5}, ["hidden_ratio", "at least 1", "1e-05"]),
        ({"tau_factor": 7**400}, ["tau_factor", "float32", "..."]),
        ({"tau_factor": 7**9999}, ["tau_factor", "float32", "type int", "too long"]),
        ({"norm_eps": 1e-60}, ["norm_eps", "float32", "1e-60"]),
        ({"min_log_mu": -1e39}, ["min_log_mu", "<= 0", "-1e+39"]),
        ({"vocab_size": 2**31}, ["vocab_size", "<= 2147483647", "2147483648"]),
        ({"intermediate_size": 10**12}, ["intermediate_size", "<= 2147483647 or None"]),
        ({"num_hidden_layers": 1001}, ["num_hidden_layers", "<= 1000", "1001"]),
        ({"num_hidden_layers": 7 * 10**8}, ["num_hidden_layers", "<= 1000", "700000000"]),
        (
            {"attn": {"layers": [0], "num_heads": 4, "rope_theta": 1e300}},
            ["attn.rope_theta", "float32", "1e+300"],
        ),
        ({"vocab_size": [[]] * 999}, ["vocab_size", "int", "..."]),
        ({"bound_beta": 1}, ["bound_beta", "bool", "1"]),
        ({"bound_beta": True, "bound": "none"}, ["bound_beta", "no such flag", "True"]),
        ([], ["config", "JSON object", "[]"]),
    ],
)
def test_bad_configuration(published, words):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        MDNConfig.from_dict(published)
    for word in words:
        assert word in str(raised.value), str(raised.value)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("key", ["vocab_size", "attn", "architectures"])
def test_a_value_too_deep_to_write(key):
    with pytest.raises(ValueError, match=f"{key}: expected .*got .*too ") as raised:
        MDNConfig.from_dict({key: nested(100_000)})
    assert len(str(raised.value)) < 300


def test_every_field_is_explained():
    for kind in (MDNConfig, AttentionConfig):
        for field in dataclasses.fields(kind):
            assert f"\n  {field.name}: " in kind.__doc__.replace("\n      ", "\n  "), field.name


def test_configurations_from_before_the_one_bound():
    for alpha, beta, bound in (
        (True, True, "published"),
        (True, False, "alpha"),
        (False, True, "beta"),
        (False, False, "none"),
    ):
        saved = {"bound_alpha": alpha, "bound_beta": beta}
        assert MDNConfig.from_dict(saved) == MDNConfig(bound=bound)
        assert "bound_alpha" not in MDNConfig.from_dict(saved).to_dict()
    assert MDNConfig.from_dict({"bound_beta": False}).bound == "alpha"
