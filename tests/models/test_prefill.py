"""Prompts in pieces and with padding: the states of prompts read whole and alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MDNForCausalLM, generate
from mdn_jax.layers.attention import AttentionCache
from mdn_jax.models import Decoder, initial_state, prefill
from mdn_jax.models.prefill import _prefill
from mdn_jax.ops import target_gpu
from tests.layers.helpers import BARE, TINY_ATTENTION, assert_close

FULL_ATTENTION = dataclasses.replace(TINY_ATTENTION, window_size=None)
CONFIGS = {
    "mdn": dataclasses.replace(BARE, num_hidden_layers=1),
    "windowed": dataclasses.replace(BARE, attn=TINY_ATTENTION),  # its first layer is that of "mdn"
    "full": dataclasses.replace(BARE, attn=FULL_ATTENTION),
}
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(31, size=n).tolist() for n in (21, 5, 8)]
PADDED = np.asarray([[1, 2, 3, 4], [30, 5, 6, 7], [9, 9, 30, 30]])
MASK = np.asarray([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]])


def decoder_of(name):
    return Decoder(MDNForCausalLM(CONFIGS[name], implementation="scan", rngs=nnx.Rngs(0)))


def newest(state, entries=32):
    """With attention caches of one size."""
    cache = [x.resized(entries) if isinstance(x, AttentionCache) else x for x in state.cache]
    return state._replace(cache=tuple(cache))


@pytest.mark.parametrize("name", ["windowed", "full"])
def test_rows_that_end_in_different_pieces_are_the_rows_in_one(name):
    decoder = decoder_of(name)
    whole = prefill(decoder, PROMPTS)
    pieces = prefill(decoder, PROMPTS, piece=8)
    assert pieces.position.tolist() == [21, 5, 8]
    assert_close(newest(pieces), newest(whole))
    more = [prefill(decoder, [[1] * 11, [], [2]], state=s, piece=8) for s in (whole, pieces)]
    assert_close(newest(more[1], 64), newest(more[0], 64))


def test_pieces_are_of_one_shape():
    decoder = decoder_of("full")
    prefill(decoder, [[1] * 8])  # a prompt of a piece
    before = _prefill._cache_size()
    for length in (33, 48, 61):  # rests of 1, 8 and 5: pieces, and rests of two shapes
        prefill(decoder, [[1] * length], piece=8)
    # with room for 64 entries: pieces of 8, the rest of 1
    assert _prefill._cache_size() == before + 2


def test_memory_is_that_of_a_piece_and_of_a_layer():
    def temporary(layers, length):
        config = dataclasses.replace(
            CONFIGS["mdn"], num_hidden_layers=layers, intermediate_size=512
        )
        model = MDNForCausalLM(config, implementation="xla", rngs=nnx.Rngs(0))
        decoder = Decoder(model)
        state = initial_state(model, 1)
        tokens, counts = np.zeros((1, length), np.int32), np.ones((1,), np.int32)
        lowered = _prefill.lower(decoder.structure, decoder.arrays, state, tokens, counts)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    activations = 512 * 32 * 4  # [T, hidden], float32
    short, long, deep = temporary(1, 256), temporary(1, 512), temporary(2, 512)
    assert short < 0.7 * long  # so a piece bounds it
    # a gradient would keep 20 arrays of this size in each layer, of the MLP alone 16
    assert deep - long < 1.5 * activations


def test_gpu_kernels_write_nothing_that_only_a_gradient_reads():
    model = MDNForCausalLM(CONFIGS["mdn"], dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    decoder = Decoder(model)
    tokens, counts = np.zeros((1, 128), np.int32), np.ones((1,), np.int32)
    arguments = (decoder.arrays, initial_state(model, 1), tokens, counts)
    with target_gpu():
        traced = jax.make_jaxpr(_prefill, static_argnums=0)(decoder.structure, *arguments)
    kernels = list(kernels_of(traced.jaxpr))
    assert {"mdn_intra_chunk_fwd", "mdn_state_fwd", "mdn_output_fwd"} <= {n for n, _ in kernels}
    assert all(read for _, read in kernels), kernels


def kernels_of(jaxpr):
    """Kernels of a program by name, and whether every result of each is read."""
    read = {id(x) for equation in jaxpr.eqns for x in equation.invars}
    read |= set(map(id, jaxpr.outvars))
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation.params["name"], all(id(x) in read for x in equation.outvars)
            continue
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from kernels_of(inner)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, lambda x: x.tolist()])
def test_padding_on_either_side_leaves_no_trace(kind):
    decoder = decoder_of("mdn")
    expected = prefill(decoder, [[1, 2, 3, 4], [5, 6, 7], [9, 9]])
    padded = prefill(decoder, kind(PADDED), attention_mask=kind(MASK))
    jax.tree.map(np.testing.assert_array_equal, padded, expected)


def test_padded_prompts_are_continued():
    decoder = decoder_of("mdn")
    options = {"max_new_tokens": 5, "block": 4, "seed": 3}
    lists = generate(decoder, [[1, 2, 3, 4], [5, 6, 7], [9, 9]], **options)
    assert generate(decoder, PADDED, attention_mask=MASK, **options).tokens == lists.tokens


@pytest.mark.parametrize(
    ("prompts", "mask", "message"),
    [
        ([[1, 2, 3]], [[1, 0, 1]], r"attention_mask\[0\]: expected padding .* got a 0 .* at 1"),
        ([[1, 2, 3]], [[1, 2, 1]], r"attention_mask\[0\]: expected 0 and 1, got \[1, 2, 1\]"),
        ([[1, 2, 3]], [[1, 1]], r"attention_mask: expected the shape \[B, T\] of .* got \[1, 2\]"),
        ([[1, 2], [3]], [[1, 1], [1, 0]], "attention_mask: .* got rows of different lengths"),
        ([[1, 2], [3, 4]], [[1, 1], [0, 0]], r"prompts\[1\]: expected at least one token"),
        ([[1, 2]], [[True, False]], None),
    ],
)
def test_masks_that_do_not_fit(prompts, mask, message):
    decoder = decoder_of("mdn")
    if message is None:
        assert prefill(decoder, prompts, attention_mask=mask).position.tolist() == [1]
        return
    with pytest.raises(ValueError, match=message):
        prefill(decoder, prompts, attention_mask=mask)


def test_a_piece_has_tokens():
    with pytest.raises(ValueError, match="piece: expected an int >= 1, got 0"):
        prefill(decoder_of("mdn"), [[1]], piece=0)
