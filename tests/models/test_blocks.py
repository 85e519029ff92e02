"""The decode block: rows of different requests in one batch, and programs that are few."""

import dataclasses
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MDNForCausalLM, Sampling, generate
from mdn_jax.models import Decoder, prefill, sampling_arrays, stop_array, with_room
from tests.layers.helpers import BARE, TINY_ATTENTION, assert_close, call

CONFIG = dataclasses.replace(BARE, attn=dataclasses.replace(TINY_ATTENTION, window_size=None))
MODEL = MDNForCausalLM(CONFIG, implementation="scan", rngs=nnx.Rngs(0))
VOCAB = CONFIG.vocab_size
PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [3, 3, 3], [11, 12, 13, 14]]
SAMPLINGS = [
    Sampling(temperature=0.0, logit_bias={0: 0.0}),  # as the others: of one program
    Sampling(temperature=0.7, top_k=5, top_p=0.9, logit_bias={0: -100}),
    Sampling(vocab_limit=9, repetition_penalty=1.4, logit_bias={0: 0.0}),
    Sampling(temperature=1.3, min_p=0.2, logit_bias={4: 100.0, 5: 99.0}),
]


@contextmanager
def compiled():
    """A list of the programs compiled inside."""
    programs = []

    def count(event, seconds, **names):
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(names.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield programs
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_rows_of_different_requests_are_the_requests_alone():
    options = {
        "max_new_tokens": [9, 3, 6, 9],
        "sampling": SAMPLINGS,
        "stop_tokens": [[], [7, 8], [], list(range(20, 30))],
        "seed": [5, 4, 3, 2],
    }
    together = generate(MODEL, PROMPTS, block=8, logprobs=2, **options)
    for row, prompt in enumerate(PROMPTS):
        own = {name: [values[row]] for name, values in options.items()}
        alone = generate(MODEL, [prompt], block=8, logprobs=2, **own)
        assert alone.tokens[0] == together.tokens[row]
        assert alone.ended[0] == together.ended[row]
        np.testing.assert_allclose(alone.logprobs[0].drawn, together.logprobs[row].drawn, atol=1e-5)
        states = (together.state.logits[row], together.state.position[row])
        assert_close(states, (alone.state.logits[0], alone.state.position[0]))
    assert together.state.position.tolist() == [
        len(prompt) + len(new) for prompt, new in zip(PROMPTS, together.tokens, strict=True)
    ]
    assert len(together.tokens[0]) == 9
    assert len(together.tokens[1]) <= 3
    assert set(together.tokens[2]) <= set(range(9))
    assert set(together.tokens[3]) == {4, 5}


def test_a_row_that_is_not_active_stays_as_it_is():
    decoder = Decoder(MODEL)
    state = with_room(MODEL, prefill(MODEL, PROMPTS), 8, None)
    arrays = sampling_arrays(SAMPLINGS, 4, vocab_size=VOCAB)
    limits = np.asarray([0, 2, 0, 5], np.int32)
    block = decoder.block(state, limits, arrays, stop_array([[]] * 4), size=8)
    assert block.counts.tolist() == [0, 2, 0, 5]
    assert not block.ended.any()
    assert block.logprobs is None
    for row in (0, 2):
        before, after = (
            jax.tree.leaves(jax.tree.map(lambda x, row=row: x[row], (s.cache[0], *s[1:])))
            for s in (state, block.state)
        )
        for x, y in zip(before, after, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_are_those_of_the_whole_sequence(temperature):
    sampling = Sampling(temperature=temperature, vocab_limit=20, repetition_penalty=1.5)
    piece = generate(MODEL, [PROMPTS[0]], max_new_tokens=9, block=8, sampling=sampling, logprobs=3)
    (row,) = piece.logprobs
    logits, _ = call(MODEL, jnp.asarray([PROMPTS[0] + piece.tokens[0]]))
    logits = np.asarray(logits[0, 2:-1], np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    steps = np.arange(9)
    np.testing.assert_allclose(row.drawn, expected[steps, piece.tokens[0]], atol=2e-5)
    order = np.argsort(-expected, axis=-1, kind="stable")[:, :3]
    assert [[token for token, _ in step] for step in row.likeliest] == order.tolist()
    values = [[value for _, value in step] for step in row.likeliest]
    np.testing.assert_allclose(values, expected[steps[:, None], order], atol=2e-5)


def test_requests_of_twenty_kinds_compile_nothing_new():
    config = dataclasses.replace(BARE, vocab_size=43, num_hidden_layers=1)  # of no other test
    model = MDNForCausalLM(config, implementation="scan", rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def request(number):
        lengths = rng.integers(5, 9, size=2)  # of one bucket
        generate(
            model,
            [rng.integers(43, size=n).tolist() for n in lengths],
            max_new_tokens=rng.integers(1, 30, size=2).tolist(),
            sampling=Sampling(
                temperature=float(rng.choice([0.0, 0.5, 1.7])),
                top_k=int(rng.integers(1, 50)) if number % 3 else None,
                top_p=float(rng.uniform(0.1, 1.0)) if number % 4 else 1.0,
                min_p=float(rng.uniform(0, 0.2)),
                repetition_penalty=float(rng.uniform(0.8, 1.5)),
                vocab_limit=int(rng.integers(20, 44)),
            ),
            stop_tokens=rng.integers(43, size=number % 9).tolist(),
            seed=int(rng.integers(1000)),
            block=8,
        )

    with compiled() as programs:
        request(0)
        assert 1 <= len(programs) <= 3, programs
        programs.clear()
        for number in range(1, 20):
            request(number)
        assert programs == []
