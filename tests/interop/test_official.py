"""Published parameters, both ways."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MDNForCausalLM, MomentumDeltaNet
from mdn_jax.interop import layer_from_official, model_from_official, official_state_dict
from mdn_jax.layers import SoftmaxAttention
from tests.layers.helpers import GOLDEN, INDEX, TINY, TINY_ATTENTION, assert_close, golden, normal

LAYERS = sorted(path.stem for path in GOLDEN.glob("layer_*.npz"))
HYBRID = dataclasses.replace(
    TINY,
    conv_bias=True,
    use_lora_gate=True,
    attn=dataclasses.replace(TINY_ATTENTION, qkv_bias=True),
)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype
        assert isinstance(actual[name], np.ndarray)
        np.testing.assert_array_equal(actual[name], x, err_msg=name)


@pytest.mark.parametrize("case", LAYERS)
def test_layer_round_trip_is_exact(case):
    _, tensors = golden(case)
    config = INDEX["layer"][case.removeprefix("layer_")]["config"]
    assert_same(official_state_dict(layer_from_official(config, tensors)), tensors)


def test_model_round_trip_is_exact():
    _, tensors = golden("model_tiny_T50")
    config = INDEX["model"]["tiny_T50"]["config"]
    model = model_from_official(config, tensors)
    assert_same(official_state_dict(model), tensors)
    assert model.config.to_dict().items() >= config.items()


def test_published_layer_defaults():
    _, tensors = golden("layer_base_T37")
    layer = layer_from_official({"hidden_size": 64, "num_heads": 2, "head_dim": 16}, tensors)
    assert layer.config.norm_eps == layer.o_norm.eps == 1e-5
    assert (layer.config.expand_v, layer.config.min_log_mu, layer.config.tau_factor) == (2, -2, 1)
    given = {"hidden_size": 64, "num_heads": 2, "head_dim": 16, "norm_eps": 1e-3}
    assert layer_from_official(given, tensors).o_norm.eps == 1e-3


def test_published_model_default_of_norm_eps():
    _, tensors = golden("model_tiny_T50")
    config = {k: v for k, v in INDEX["model"]["tiny_T50"]["config"].items() if k != "norm_eps"}
    model = model_from_official(config, tensors)
    block = model.layers[0]
    norms = (block.mixer_norm, block.mlp_norm, block.mixer.o_norm, model.norm)
    assert {norm.eps for norm in norms} == {1e-6}


def test_hybrid_names_and_round_trip():
    model = MDNForCausalLM(HYBRID, rngs=nnx.Rngs(5))
    tensors = official_state_dict(model)
    mixer = ["A_log", "dt_bias", "mu_bias", "Mu_log", "log_factor", "D_log", "o_norm.weight"]
    mixer += [f"{n}_proj.weight" for n in "qkvabmeo"]
    mixer += [f"{n}_conv1d.{kind}" for n in "qkv" for kind in ("weight", "bias")]
    mixer += ["g_proj.0.weight", "g_proj.1.weight", "g_proj.1.bias"]
    attention = [f"{n}_proj.{kind}" for n in "qkv" for kind in ("weight", "bias")]
    attention += ["o_proj.weight"]
    block = ["attn_norm.weight", "mlp_norm.weight"]
    block += [f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
    names = {"model.embeddings.weight", "model.norm.weight", "lm_head.weight"}
    for layer, names_of_mixer in enumerate((mixer, attention)):
        names |= {f"model.layers.{layer}.attn.{name}" for name in names_of_mixer}
        names |= {f"model.layers.{layer}.{name}" for name in block}
    assert tensors.keys() == names
    assert tensors["model.layers.0.attn.q_conv1d.weight"].shape == (16, 1, 4)
    assert tensors["model.layers.0.attn.g_proj.0.weight"].shape == (16, 32)
    assert tensors["model.layers.1.attn.k_proj.weight"].shape == (16, 32)
    again = model_from_official(HYBRID.to_dict(), tensors)
    assert_same(official_state_dict(again), tensors)
    tokens = jnp.asarray([[1, 2, 3, 4, 5]], jnp.int32)
    assert_close(again(tokens), model(tokens), 0)


def test_attention_layer():
    layer = SoftmaxAttention(32, 4, num_kv_heads=2, qkv_bias=True, rngs=nnx.Rngs(0))
    tensors = official_state_dict(layer)
    assert tensors["k_proj.weight"].shape == (16, 32)
    np.testing.assert_array_equal(tensors["k_proj.weight"], layer.k_proj.kernel[...].T)


def test_tied_embeddings():
    config = dataclasses.replace(TINY, tie_word_embeddings=True)
    tensors = official_state_dict(MDNForCausalLM(config, rngs=nnx.Rngs(0)))
    np.testing.assert_array_equal(tensors["lm_head.weight"], tensors["model.embeddings.weight"])
    assert_same(official_state_dict(model_from_official(config.to_dict(), tensors)), tensors)
    without = {name: x for name, x in tensors.items() if name != "lm_head.weight"}
    assert_same(official_state_dict(model_from_official(config.to_dict(), without)), tensors)
    other = tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}
    with pytest.raises(ValueError, match=r"lm_head.weight: expected the tensor of"):
        model_from_official(config.to_dict(), other)


def test_parameters_take_the_dtype_asked_for():
    layer = MomentumDeltaNet(TINY, rngs=nnx.Rngs(0))
    tensors = official_state_dict(layer)
    low = layer_from_official(
        TINY.to_dict(), tensors, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, implementation="scan"
    )
    assert low.implementation == "scan"
    assert low.dtype == jnp.bfloat16
    expected = {name: x.astype(jnp.bfloat16) for name, x in tensors.items()}
    assert_same(official_state_dict(low), expected)
    y, _ = low(normal(0, 1, 3, 32))
    assert y.dtype == jnp.bfloat16


def test_every_tensor_that_does_not_fit_is_listed():
    tensors = official_state_dict(MomentumDeltaNet(TINY, rngs=nnx.Rngs(0)))
    del tensors["A_log"], tensors["k_proj.weight"]
    tensors |= {"A_log2": np.zeros((2,)), "q_proj.weight": np.zeros((32, 16))}
    tensors |= {"v_conv1d.weight": np.zeros((32, 4))}
    with pytest.raises(ValueError, match="tensors: ") as raised:
        layer_from_official(TINY.to_dict(), tensors)
    for problem in (
        "missing A_log [2]",
        "missing k_proj.weight [16, 32]",
        "unexpected A_log2 [2]",
        "q_proj.weight: expected shape [16, 32], got [32, 16]",
        "v_conv1d.weight: expected shape [32, 1, 4], got [32, 4]",
    ):
        assert problem in str(raised.value), str(raised.value)


def test_unknown_arguments_and_modules():
    with pytest.raises(
        ValueError, match="head_dims: unknown key; the closest known one is head_dim"
    ):
        layer_from_official({"head_dims": 3}, {})
    with pytest.raises(TypeError, match=r"module: expected MDNForCausalLM.*, got Linear"):
        official_state_dict(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
