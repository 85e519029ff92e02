"""Records of a model's layers: those of its own forward pass, whole or in pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.analysis import record_layers, state_norms
from mdn_jax.models import AttentionConfig


@pytest.fixture(scope="module")
def model():
    config = MDNConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=3,
        num_heads=2,
        head_dim=8,
        intermediate_size=16,
        attn=AttentionConfig(layers=(1,), num_heads=2),
        other_mixer="titans",
        other_layers=(2,),
    )
    return MDNForCausalLM(config, implementation="scan", rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 12)))


def assert_close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


def test_the_states_are_those_of_the_model(model, tokens):
    ids = jnp.asarray([[0] * 5 + [1] * 7, [0] * 12])
    records, cache = nnx.jit(record_layers)(model, tokens, ids)
    _, expected = nnx.jit(lambda model, *x: model(*x))(model, tokens, ids)
    assert_close(cache, expected)
    assert list(records) == [0, 2]
    assert_close(records[0].erase, np.exp(records[0].gates.log_alpha))
    assert (records[2].erase == 1).all()  # Titans reads its memory before it decays
    assert (records[2].gates.beta == 1).all()
    for layer, record in records.items():
        assert_close(record.state, expected[layer].state)
        assert {x.shape for x in record.gates} == {(2, 12, 2)}
        for norm, state in zip(state_norms(record.state), record.state, strict=True):
            flat = np.asarray(state).reshape(2, 2, -1)
            np.testing.assert_allclose(norm, np.linalg.norm(flat, axis=-1), rtol=1e-5)


def test_pieces_are_the_whole(model, tokens):
    record = nnx.jit(record_layers)
    whole, _ = record(model, tokens)
    first, cache = record(model, tokens[:, :5])
    rest, _ = record(model, tokens[:, 5:], cache=cache)
    for layer in whole:
        pieces = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b], axis=1), first[layer].gates, rest[layer].gates
        )
        assert_close(pieces, whole[layer].gates)
        assert_close(rest[layer].state, whole[layer].state)
    with pytest.raises(ValueError, match=r"cache: expected 3 entries \(the layers\), got 2"):
        record_layers(model, tokens, cache=cache[:2])
