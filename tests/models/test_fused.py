"""The kernels' steps against the model's own, whole models and blocks of tokens."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MDNForCausalLM, Sampling
from mdn_jax.models import Decoder, prefill, sampling_arrays, steps, stop_array, with_states
from mdn_jax.models import fused as module
from mdn_jax.models.attention_config import AttentionConfig
from mdn_jax.models.fused import fused_cache_lacks, fused_lacks, fused_structure, fused_weights
from tests.kernels.test_decoding import CONFIG, drawn


@pytest.mark.parametrize(
    ("dtype", "batch", "options"),
    [
        ("float32", 1, {"num_hidden_layers": 2, "num_v_heads": 2}),
        ("float32", 3, {"intermediate_size": 0, "tie_word_embeddings": True}),
        ("bfloat16", 1, {}),
        ("bfloat16", 17, {"num_hidden_layers": 2, "conv_bias": True}),
    ],
)
def test_tokens_one_by_one_are_those_of_the_model(dtype, batch, options):
    config = dataclasses.replace(CONFIG, **options)
    model = drawn(config, dtype)
    # of a bfloat16 model the same in float32: both paths round on their way to it
    exact = drawn(config)
    nnx.update(exact, jax.tree.map(lambda x: np.asarray(x, np.float32), nnx.state(model)))
    structure, weights = fused_structure(model, interpret=True), fused_weights(model)
    random = np.random.default_rng(0)
    by_kernels = jax.jit(lambda memory, *x: structure.steps(weights).step(memory, *x))

    def layers(model):
        return jax.jit(lambda cache, x, n: model(x[:, None], cache=cache, lengths=n))

    own = layers(model)
    best = own if dtype == "float32" else layers(exact)
    cache, exactly = model.init_cache(batch), exact.init_cache(batch)
    memory = jax.jit(structure.steps(weights).enter)(cache)
    errors = []
    for _ in range(20):
        tokens = random.integers(config.vocab_size, size=batch).astype(np.int32)
        active = (random.random(batch) < (0.8 if batch > 1 else 1)).astype(np.int32)
        got, memory = by_kernels(memory, tokens, active)
        expected, cache = own(cache, tokens, active)
        true, exactly = best(exactly, tokens, active)
        rows = active > 0
        got, expected, true = (
            np.asarray(jax.nn.log_softmax(x))[rows] for x in (got, expected[:, 0], true[:, 0])
        )
        if dtype == "float32":
            np.testing.assert_allclose(got, expected, atol=2e-4)
            np.testing.assert_array_equal(got.argmax(-1), expected.argmax(-1))
        errors.append([np.square(x - true).sum() for x in (got, expected)])
    kernels, layers_own = np.sqrt(np.sum(errors, axis=0))
    assert dtype == "float32" or kernels <= 1.2 * layers_own
    after = structure.steps(weights).leave(memory)
    for x, y, z in zip(*map(jax.tree.leaves, (after, cache, exactly)), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        x, y, z = (np.asarray(a, np.float32) for a in (x, y, z))
        if dtype == "float32":
            np.testing.assert_allclose(x, y, atol=2e-4)
        else:
            assert np.linalg.norm(x - z) <= 1.2 * np.linalg.norm(y - z)


def test_a_token_outside_the_vocabulary_gives_nan_in_its_row_alone():
    model = drawn(CONFIG)
    structure, weights = fused_structure(model, interpret=True), fused_weights(model)
    memory = structure.steps(weights).enter(model.init_cache(3))
    run = jax.jit(lambda memory, x: structure.steps(weights).step(memory, x))
    got, memory = run(memory, jnp.asarray([CONFIG.vocab_size, 3, -1], jnp.int32))
    later, _ = run(memory, jnp.asarray([1, 1, 1], jnp.int32))
    for logits in (got, later):
        np.testing.assert_array_equal(jnp.isnan(logits).all(axis=1), [True, False, True])
        np.testing.assert_array_equal(jnp.isnan(logits).any(axis=1), [True, False, True])


def test_blocks_of_tokens_are_those_of_the_layers(monkeypatch):
    model = drawn(CONFIG)
    monkeypatch.setattr(steps, "fused_lacks", partial(fused_lacks, interpret=True))
    monkeypatch.setattr(steps, "fused_structure", partial(fused_structure, interpret=True))
    state = prefill(model, [[1, 2, 3], [4], [5, 6]])
    arrays = sampling_arrays(
        [Sampling(temperature=0.0), Sampling(temperature=1.0), Sampling(top_k=3)],
        3,
        vocab_size=CONFIG.vocab_size,
        seed=5,
        dtype=state.logits.dtype,
    )
    limits, stop = np.asarray([7, 0, 4], np.int32), stop_array([[], [], []])
    made = [
        Decoder(model, steps=kind).block(state, limits, arrays, stop, size=8)
        for kind in ("layers", "kernels")
    ]
    for layers, kernels in zip(*map(jax.tree.leaves, made), strict=True):
        np.testing.assert_allclose(kernels, layers, atol=2e-4)
    halved = state._replace(cache=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.cache))
    with pytest.raises(ValueError, match='state: steps "kernels" expects float32 states, got bf'):
        Decoder(model, steps="kernels").block(halved, limits, arrays, stop, size=8)
    # a row that took none is as it was
    for before, after in zip(*map(jax.tree.leaves, (state, made[1].state)), strict=True):
        np.testing.assert_array_equal(after[1], before[1])


def test_the_default_is_what_is_faster(monkeypatch):
    model = drawn(CONFIG)
    assert not steps._faster(model)  # float32, on a CPU
    cache = model.init_cache(2)
    assert steps.KernelSteps(model, None).for_cache(cache, 2) is None
    monkeypatch.setattr(steps, "_faster", lambda _: True)
    default = steps.KernelSteps(model, None)
    structure, weights = default.for_cache(cache, 2)
    assert structure == fused_structure(model)
    assert default.for_cache(cache, steps.MOST_ROWS)[1] is weights  # joined once
    assert default.for_cache(cache, steps.MOST_ROWS + 1) is None
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), cache)
    assert default.for_cache(halved, 2) is None


def test_states_in_bfloat16_are_those_of_the_layers(monkeypatch):
    model = drawn(CONFIG)
    monkeypatch.setattr(steps, "fused_lacks", partial(fused_lacks, interpret=True))
    monkeypatch.setattr(steps, "fused_structure", partial(fused_structure, interpret=True))
    wide = prefill(model, [[1, 2, 3], [4]])
    state = with_states(model, wide, state_dtype="bfloat16")
    arrays = sampling_arrays(Sampling(temperature=0.0), 2, vocab_size=CONFIG.vocab_size)
    limits, stop = np.asarray([8, 8], np.int32), stop_array([[], []])

    def block(kind, state):
        return Decoder(model, steps=kind).block(state, limits, arrays, stop, size=8)

    layers, kernels = block("layers", state), block("kernels", state)
    assert jax.tree.structure(kernels) == jax.tree.structure(layers)
    exact = block("layers", wide).state.logits
    rounded = jnp.abs(layers.state.logits - exact).max()
    # one rounding of a state that falls the other way is a part of what all of them make
    assert 0 < jnp.abs(kernels.state.logits - exact).max() < 2 * rounded
    assert jnp.abs(kernels.state.logits - layers.state.logits).max() < 0.5 * rounded
    np.testing.assert_array_equal(kernels.tokens, layers.tokens)
    for one, other in zip(
        *(jax.tree.leaves(x.state.cache) for x in (kernels, layers)), strict=True
    ):
        assert one.dtype == other.dtype
    scaled = with_states(model, wide, state_dtype="float16_scaled")
    with pytest.raises(ValueError, match="float32 or bfloat16, got float16_scaled"):
        block("kernels", scaled)
    monkeypatch.setattr(steps, "_faster", lambda _: True)
    assert steps.KernelSteps(model, None).for_cache(state.cache, 2) is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "a CUDA GPU, got none"),
        ({"mixer": "gdn"}, "Momentum DeltaNet in every layer, got gdn in layer 0"),
        ({"mixer": "titans"}, "got titans in layer 0"),
        ({"attn": AttentionConfig(layers=(0,), num_heads=2)}, "got attention in layer 0"),
        ({"use_short_conv": False}, "short convolutions .*, got none"),
        ({"use_lora_gate": True}, "an output gate of one projection .*, got two"),
        ({"head_dim": 8}, "K one of .*, got 8"),
        ({"intermediate_size": 24}, "width of the MLP a multiple of 16, got 24"),
    ],
)
def test_a_model_that_the_kernels_do_not_take_is_named(options, expected):
    model = MDNForCausalLM(dataclasses.replace(CONFIG, **options), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f'steps: "kernels" expects .*{expected}'):
        Decoder(model, steps="kernels")


def test_implementations_dtypes_and_states_that_the_kernels_do_not_take(monkeypatch):
    model = MDNForCausalLM(CONFIG, implementation="scan", rngs=nnx.Rngs(0))
    assert fused_lacks(model, interpret=True) == (
        "implementation \"pallas_triton\" or None, got 'scan'"
    )
    model = drawn(CONFIG)
    assert fused_lacks(model, interpret=True) is None
    cache = model.init_cache(2)
    assert fused_cache_lacks(cache) is None
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), cache)
    assert fused_cache_lacks(halved) == "float32 states, got bfloat16"
    monkeypatch.setattr(module.api, "_capability", lambda: (9, 0))
    assert fused_lacks(model) == "a CUDA GPU, got none"  # the parameters lie on the CPU
    with pytest.raises(ValueError, match='steps: expected "layers", "kernels" or None, got 3'):
        Decoder(model, steps=3)
