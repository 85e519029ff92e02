import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.models import AttentionConfig
from mdn_jax.text.decoding import ByteDecoder
from mdn_jax.text.tokenizer import encode
from tests.tiny import TINY_MODEL
from train.evaluation.sample import sample
from train.step import split_model


@pytest.fixture(scope="module")
def hybrid():
    attention = AttentionConfig(layers=(1,), num_heads=2)
    # more ids than the tokenizer has, and large weights, so that choices are clear
    changes = {"num_hidden_layers": 2, "vocab_size": 300, "initializer_range": 0.5}
    config = MDNConfig(**TINY_MODEL | changes, attn=attention)
    return MDNForCausalLM(config, implementation="scan", rngs=nnx.Rngs(0))


def test_greedy_sample_is_the_choice_of_the_whole_sequence(hybrid, monkeypatch):
    _, params = split_model(hybrid)
    monkeypatch.setattr(ByteDecoder, "add", lambda self, tokens: ",".join(map(str, tokens)))
    text = sample(hybrid, params, prompt="ab", length=12, temperature=0, seed=0)
    chosen = [int(token) for token in text.removeprefix("ab").split(",")]
    tokens = np.append(encode(b"ab").astype(np.int32), np.int32(chosen))[None]
    logits, _ = nnx.jit(lambda model, tokens: model(tokens))(hybrid, jnp.asarray(tokens))
    assert jnp.argmax(logits[0, 2:-1, :256], axis=-1).tolist() == chosen


def test_sample_is_a_function_of_the_seed(hybrid):
    _, params = split_model(hybrid)
    texts = [
        sample(hybrid, params, prompt="", length=12, temperature=1.0, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert jax.tree.leaves(params)[0].size  # parameters are not used up


def test_a_sample_of_nothing_is_the_prompt(hybrid):
    _, params = split_model(hybrid)
    assert sample(hybrid, params, prompt="é", length=0, temperature=1.0, seed=0) == "é"
