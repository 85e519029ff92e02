"""Steps of single tokens with joined matrices: those of the model as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.models import structure
from mdn_jax.models.attention_config import AttentionConfig
from mdn_jax.models.joined import Columns, joins
from mdn_jax.models.structure import LayerSteps, layer_steps
from tests.tiny import TINY_MODEL


@pytest.mark.parametrize(
    "options",
    [
        {"num_hidden_layers": 2, "attn": AttentionConfig(layers=(1,), num_heads=2)},
        {"mixer": "gdn", "tie_word_embeddings": True, "intermediate_size": 0},
        {"attn": AttentionConfig(layers=(0,), num_heads=2, qkv_bias=True)},
    ],
)
def test_steps_with_joined_matrices(options, monkeypatch):
    config = MDNConfig(**TINY_MODEL | {"initializer_range": 0.3} | options)
    model = MDNForCausalLM(config, implementation="xla", rngs=nnx.Rngs(0))
    assert not joins()  # there is no GPU
    assert layer_steps(model) == LayerSteps(model)
    monkeypatch.setattr(structure, "joins", lambda: True)
    graph, state = nnx.split(model)

    def steps(state, tokens, *, joined):
        model = nnx.merge(graph, state)
        taken = layer_steps(model) if joined else LayerSteps(model)
        cache, found = model.init_cache(2, 8), []
        for token in tokens:
            logits, cache = taken.step(cache, token)
            found.append(logits)
        return jnp.stack(found), cache

    tokens = jnp.asarray([[1, 256], [3, 4], [5, 1]])
    plain, joined = (
        jax.jit(steps, static_argnames="joined")(state, tokens, joined=x) for x in (0, 1)
    )
    for x, y in zip(*map(jax.tree.leaves, (plain, joined)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    taken = layer_steps(model)
    assert taken.output.shape == (config.hidden_size, 264)
    found = [x for _, x in nnx.iter_modules(taken.model) if isinstance(x, Columns)]
    mdn = 4 * (config.attn is None or 1 in config.attn.layers)
    both = 3 * (config.attn is not None and not config.attn.qkv_bias)
    assert len(found) == mdn + both + 2 * config.num_hidden_layers * (config.mlp_width > 0)
    assert all(not isinstance(x, Columns) for _, x in nnx.iter_modules(model))
