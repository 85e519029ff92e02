"""Models of every mixer and of any two: configuration, generation, published folders, meshes."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM, Sampling, generate
from mdn_jax.interop import model_from_official, official_state_dict, write_folder
from mdn_jax.layers import Comba, KimiDeltaAttention, SoftmaxAttention
from mdn_jax.models import AttentionConfig, Mixer, load_state, prefill, save_state
from tests.layers.helpers import BARE, TINY, TINY_ATTENTION, assert_close, call

ONE = dataclasses.replace(TINY, num_hidden_layers=1)
THREE = dataclasses.replace(
    TINY,
    num_hidden_layers=3,
    mixer="kda",
    other_mixer="comba",
    other_layers=(2,),
    attn=AttentionConfig(layers=(1,), num_heads=4),
)


def make(config):
    return MDNForCausalLM(config, implementation="scan", rngs=nnx.Rngs(0))


def test_layers_of_several_mixers():
    assert THREE.mixers == ("kda", "attention", "comba")
    model = make(THREE)
    kinds = [type(layer.mixer) for layer in model.layers]
    assert kinds == [KimiDeltaAttention, SoftmaxAttention, Comba]
    assert model.layers[1].mixer.num_heads == 4


def test_attention_as_the_mixer():
    plain = dataclasses.replace(ONE, mixer="attention")
    assert make(plain).layers[0].mixer.num_heads == 2
    details = AttentionConfig(layers=(), num_heads=4, num_kv_heads=1, window_size=3)
    mixer = make(dataclasses.replace(plain, attn=details)).layers[0].mixer
    assert (mixer.num_heads, mixer.num_kv_heads, mixer.window_size) == (4, 1, 3)
    other = dataclasses.replace(TINY, other_mixer="attention", other_layers=(0,))
    assert other.mixers == ("attention", "mdn")


@pytest.mark.parametrize("mixer", ["gdn2", "mamba3", "titans"])
def test_an_unknown_token_marks_its_row_alone_in_any_state(mixer):
    model = make(dataclasses.replace(BARE, num_hidden_layers=1, mixer=mixer))
    _, cache = call(model, jnp.asarray([[1, 99], [2, 3]]))
    for x in jax.tree.leaves(cache[0].state):
        assert jnp.isnan(x[0]).any()
        assert jnp.isfinite(x[1]).all()
    logits, _ = call(model, jnp.asarray([[4], [5]]), None, cache)
    assert jnp.isnan(logits[0]).all()
    assert jnp.isfinite(logits[1]).all()


def test_no_mlp():
    model = make(dataclasses.replace(ONE, mixer="mamba2", intermediate_size=0))
    names = {path[2] for path, _ in nnx.to_flat_state(nnx.state(model)) if path[0] == "layers"}
    assert names == {"mixer_norm", "mixer"}
    h = jnp.ones((1, 4, 32))
    block = model.layers[0]
    assert_close(block(h)[0], h + block.mixer(block.mixer_norm(h))[0], 0)


NEGATIVE = dataclasses.replace(ONE, mixer="gdn", allow_neg_eigval=True)
STABLE = dataclasses.replace(ONE, bound="stable")


@pytest.mark.parametrize(
    "config", [ONE, THREE, dataclasses.replace(ONE, mixer="mamba2"), NEGATIVE, STABLE]
)
def test_round_trip(config):
    back = config.to_dict()
    assert MDNConfig.from_dict(json.loads(json.dumps(back))) == config
    assert ("mixer" in back) == (config.mixer != "mdn")  # what is published has no such key
    assert ("other_layers" in back) == bool(config.other_layers)
    assert ("bound" in back, "allow_neg_eigval" in back) == (config is STABLE, config is NEGATIVE)
    hash(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"mixer": "rwkv"},
            ["mixer", "gdn2, mamba2, mamba3, titans, attention", "'rwkv'"],
        ),
        ({"other_mixer": "gpt"}, ["other_mixer", "mdn, gdn", "None", "'gpt'"]),
        ({"other_mixer": "gdn"}, ["other_layers", "if there is an other_mixer", "()"]),
        ({"other_layers": (0,)}, ["other_layers", "else none", "(0,)"]),
        ({"other_mixer": "gdn", "other_layers": (2,)}, ["other_layers", "0 to 1", "(2,)"]),
        ({"other_mixer": "gdn", "other_layers": 1}, ["other_layers", "tuple", "1"]),
        (
            {"other_mixer": "gdn", "other_layers": (1,), "attn": TINY_ATTENTION},
            ["other_layers", "none of attn.layers = (1,)", "(1,)"],
        ),
        ({"mixer": "kda", "num_v_heads": 4}, ["num_v_heads", "with mixer kda", "4"]),
        ({"mixer": "gdn2", "num_v_heads": 4}, ["num_v_heads", "with mixer gdn2", "4"]),
        ({"mixer": "mamba3", "head_dim": 3, "expand_v": 1}, ["head_dim", "at least 4", "3"]),
        ({"mixer": "attention", "num_heads": 32}, ["num_heads", "even width", "32"]),
        ({"intermediate_size": -1}, ["intermediate_size", ">= 0", "-1"]),
        ({"bound": "loose"}, ["bound", "published, stable, alpha, beta, none", "'loose'"]),
        ({"allow_neg_eigval": True}, ["allow_neg_eigval", "False without mixer gdn", "True"]),
    ],
)
def test_bad_fields(changes, words):
    with pytest.raises(ValueError, match=words[0]) as raised:
        dataclasses.replace(TINY, **changes)
    for word in words:
        assert word in str(raised.value), str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [m for m in get_args(Mixer) if m != "mdn"])
def test_generation(mixer, tmp_path):
    """Rows of a batch as if alone, in pieces, through a file; greedy tokens of the whole text."""
    model = make(dataclasses.replace(BARE, num_hidden_layers=1, mixer=mixer))
    options = {"sampling": Sampling(temperature=0.0), "block": 4, "max_new_tokens": 5}
    prompts = [[1, 2, 3, 4], [5, 6, 7]]
    piece = generate(model, prompts, **options)
    for row, tokens in zip(prompts, piece.tokens, strict=True):
        logits, _ = call(model, jnp.asarray([(row + tokens + [0])[:9]]))
        start = len(row) - 1
        assert jnp.argmax(logits[0, start : start + 5], axis=-1).tolist() == tokens
    long = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2]]  # in pieces of 4 tokens of each row
    read = prefill(model, [row[:8] for row in long], piece=4)
    for row, tokens in enumerate(long):
        logits, _ = call(model, jnp.asarray([(tokens + [0] * 4)[:9]]))
        np.testing.assert_allclose(
            read.logits[row], logits[0, min(8, len(tokens)) - 1], rtol=1e-4, atol=1e-4
        )
    save_state(tmp_path / "state.npz", piece.state, model)
    state = load_state(tmp_path / "state.npz", model)
    goes_on = {"sampling": options["sampling"], "block": 4, "max_new_tokens": 4}
    after = generate(model, [[], []], state=piece.state, **goes_on)
    assert generate(model, [[], []], state=state, **goes_on).tokens == after.tokens


def test_published_folders_have_mdn_alone(tmp_path):
    for changes, words in (
        ({"mixer": "gdn"}, "mixer: expected 'mdn' in a published model.*got 'gdn'"),
        ({"other_mixer": "kda", "other_layers": (1,)}, "other_mixer: expected None.*got 'kda'"),
        ({"use_momentum": False}, "use_momentum: expected True.*got False"),
        ({"bound": "stable"}, "bound: expected 'published' in a published.*got 'stable'"),
        ({"intermediate_size": 0}, "intermediate_size: expected an MLP"),
    ):
        config = dataclasses.replace(TINY, **changes)
        with pytest.raises(ValueError, match=words):
            official_state_dict(make(config))
        with pytest.raises(ValueError, match=words):
            model_from_official(config.to_dict(), {})
        with pytest.raises(ValueError, match=words):
            write_folder(tmp_path, config, ())
    assert not list(tmp_path.iterdir())


ON_A_MESH = """
import dataclasses, jax, jax.numpy as jnp
from flax import nnx
from mdn_jax import MDNForCausalLM
from mdn_jax.testing import relative_errors
from tests.models.test_mixers import ONE, THREE, make
from train.config_sections import MeshConfig
from train.parallel.sharding import make_mesh, partition

mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
tokens = jnp.arange(24).reshape(2, 12) % 31
ids = (jnp.arange(12) > 4).astype(jnp.int32)[None].repeat(2, axis=0)
mamba = {"mixer": "mamba2", "num_heads": 1, "num_v_heads": 4}
both = {"num_hidden_layers": 2, "other_mixer": "mamba3", "other_layers": (1,)}
for config in (THREE, dataclasses.replace(ONE, **mamba, **both)):
    config = dataclasses.replace(config, intermediate_size=0)  # MLPs: tests/train/parallel
    graph, params = nnx.split(make(config))

    def loss(params, tokens):
        logits, _ = nnx.merge(graph, params)(tokens, segment_ids=ids)
        return jnp.sum(jnp.sin(logits)), logits

    expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, tokens)
    with jax.set_mesh(mesh):
        cut = jax.tree_util.tree_map_with_path(
            lambda path, x: jax.device_put(
                x, jax.sharding.NamedSharding(mesh, partition(path[:-1], x))
            ),
            params,
        )
        run = jax.jit(jax.value_and_grad(lambda *x: loss(*x), has_aux=True))
        actual = run(cut, tokens)
        # the embeddings are cut too
        (_, logits), _ = run(cut, tokens.at[1, 3].set(-1).at[0, 7].set(31))
    errors = relative_errors(jax.device_get(actual), jax.device_get(expected))
    assert max(errors.values()) < 1e-4, errors
    bad = jnp.isnan(logits).all(axis=-1).astype(int).tolist()
    assert bad == [[0] * 7 + [1] * 5, [0] * 3 + [1] * 2 + [0] * 7], bad
    print("the same", config.mixer)
"""


@pytest.mark.slow
def test_on_a_mesh():
    """Rows over fsdp, heads over tensor: the loss and the gradients of one device."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["the same kda", "the same mamba2"], (
        done.stdout + done.stderr
    )
