"""The model under test: what its first block sees, sizes, initial values."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.mqar.model import (
    DROPOUT,
    GatedConvolution,
    RecallModel,
    Variant,
    initial_params,
    mixer_config,
    model_shape,
    parameter_count,
    state_entries,
)
from mdn_jax.models.causal_lm import STATE_MIXERS

TOKENS = jax.random.randint(jax.random.key(0), (2, 12), 0, 32)
PLACES = jnp.asarray([[2, 4, 11], [0, 6, 8]])


def make(variant="attention", width=16, equal="width"):
    shape = model_shape(variant, width, equal, 32)
    return RecallModel(shape, implementation="scan", rngs=nnx.Rngs(1))


def test_the_first_block_mixes_a_token_with_the_two_before_it():
    block = GatedConvolution(8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    u = jax.random.normal(jax.random.key(1), (1, 9, 8))
    changed = block(u.at[0, 4].add(1.0)) != block(u)
    assert np.flatnonzero(np.asarray(changed).any(axis=(0, 2))).tolist() == [4, 5, 6]
    kernel, bias = (np.asarray(x[...], np.float64) for x in (block.kernel, block.bias))
    x = np.asarray(u[0], np.float64)
    convolved = kernel[0] * x[2] + kernel[1] * x[3] + kernel[2] * x[4] + bias
    weights = np.asarray(block.projection.kernel[...], np.float64)
    np.testing.assert_allclose(block(u)[0, 4], convolved * (x[4] @ weights) + x[4], rtol=1e-5)


def test_logits_are_those_of_the_places():
    model = make()
    logits = model(TOKENS, PLACES)
    assert logits.shape == (2, 3, 32)
    everywhere = model.hidden(TOKENS) @ model.embeddings[...].T  # the head is the embedding
    np.testing.assert_allclose(logits[1, 2], everywhere[1, 8], rtol=1e-5)
    later = model(TOKENS.at[:, 9].set(0), PLACES)
    np.testing.assert_allclose(later[1], logits[1], rtol=1e-5)  # nothing comes from behind


def test_the_residual_stream_is_that_of_the_docstring():
    model = make()
    before, second, third, fourth, last = model.norms
    h = model.embeddings[...][TOKENS]
    h = h + model.convolution(before(h))
    h = h + second(h)
    h = h + model.mixer(third(h))[0]
    h = last(h + fourth(h))
    np.testing.assert_allclose(model.hidden(TOKENS), h, rtol=1e-5, atol=1e-6)


def test_dropout_is_of_the_embedding(monkeypatch):
    model = make()
    model.embeddings[...] = jnp.ones_like(model.embeddings[...])
    seen = []
    monkeypatch.setattr(nnx.LayerNorm, "__call__", lambda self, x: seen.append(x) or x)
    tokens = jnp.zeros((8, 64), jnp.int32)
    model.hidden(tokens, jax.random.key(0))
    kept = np.asarray(seen[0] != 0)
    assert abs(kept.mean() - (1 - DROPOUT)) < 0.015
    np.testing.assert_allclose(np.asarray(seen[0])[kept], 1 / (1 - DROPOUT), rtol=1e-6)
    seen.clear()
    model.hidden(tokens)
    assert (seen[0] == 1).all()


@pytest.mark.parametrize("variant", get_args(Variant))
def test_states_are_counted(variant):
    entries = {equal: model_shape(variant, 64, equal, 32) for equal in ("width", "state")}
    if variant == "attention":
        assert state_entries(entries["state"], 100) == 2 * 64 * 100
        return
    for shape in entries.values():
        config = mixer_config(shape)
        layer = STATE_MIXERS[shape.mixer]
        cache = nnx.eval_shape(lambda: layer(config, rngs=nnx.Rngs(0)).init_cache(1))  # noqa: B023
        assert state_entries(shape, 100) == sum(x.size for x in jax.tree.leaves(cache.state))
    if variant == "mamba3":  # beside the state of Mamba-2 its last key and value
        assert state_entries(entries["state"], 1) == 64 * 64 + 8 * (32 + 16)
        return
    assert state_entries(entries["state"], 1) == 64 * 64
    memories = (
        2 if variant.startswith(("mdn", "titans")) else 0.5 if variant in ("kda", "gdn2") else 1
    )
    assert state_entries(entries["width"], 1) == memories * 64 * 64


def test_variants_of_mdn():
    shapes = {v: model_shape(v, 16, "width", 32) for v in get_args(Variant)}
    factors = {}
    for variant in ("mdn", "mdn_slow"):
        params = initial_params(make(variant), shapes[variant])
        factors[variant] = np.exp(params["mixer"]["gates"]["log_factor"])
    np.testing.assert_allclose(factors["mdn_slow"], factors["mdn"] / 10, rtol=1e-5)
    assert (factors["mdn_slow"] <= 0.4).all()
    assert make("mdn").mixer.d_log is not None
    assert make("mdn_slow_uncorrected").mixer.d_log is None
    assert parameter_count(shapes["mdn"]) - parameter_count(shapes["mdn_uncorrected"]) == 2


def test_output_projections_start_smaller():
    model = make("gdn", 128)
    assert np.std(model.mixer.o_proj.kernel[...]) == pytest.approx(0.01, rel=0.05)
    assert np.std(model.mixer.q_proj.kernel[...]) == pytest.approx(0.02, rel=0.05)
    assert model.mixer.g_proj is None


def test_a_width_that_does_not_fit():
    with pytest.raises(ValueError, match="width: expected a multiple of 8, got 20"):
        model_shape("mdn", 20, "width", 32)
