"""States in 16 bits and replay in generation; taking tokens back."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM, Sampling, generate
from mdn_jax.models import (
    initial_state,
    load_state,
    prefill,
    rewind,
    rewind_cache,
    save_state,
    with_states,
)
from mdn_jax.ops.state import kept_as
from tests.layers.helpers import BARE, TINY, TINY_ATTENTION, assert_close
from tests.tiny import TINY_MODEL

PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9]]
GREEDY = Sampling(temperature=0.0, repetition_penalty=1.1)


def make(config, seed=0, **options):
    return MDNForCausalLM(config, implementation="scan", rngs=nnx.Rngs(seed), **options)


SMALL = make(MDNConfig(**TINY_MODEL | {"num_v_heads": 2}))
HYBRID = make(dataclasses.replace(BARE, attn=dataclasses.replace(TINY_ATTENTION, window_size=4)))
call = nnx.jit(lambda model, tokens, cache: model(tokens, cache=cache))
run = partial(generate, sampling=GREEDY, block=8)


def same(actual, expected, tolerance=1e-5):
    """What the next tokens depend on; the caches by what comes of them."""
    for name in ("logits", "seen", "position"):
        assert_close(getattr(actual, name), getattr(expected, name), tolerance)


def test_replay_gives_the_same_tokens():
    """200 of them: 25 writes of the states, rows of different lengths, a stop token."""
    expected = run(SMALL, PROMPTS, max_new_tokens=200)
    replayed = run(SMALL, PROMPTS, max_new_tokens=200, replay=8)
    assert replayed.tokens == expected.tokens
    same(replayed.state, expected.state)
    stop = expected.tokens[0][20]
    expected, replayed = (
        run(SMALL, PROMPTS, max_new_tokens=60, stop_tokens=[stop], replay=replay)
        for replay in (None, 8)
    )
    assert replayed.tokens == expected.tokens
    assert replayed.ended == expected.ended
    same(replayed.state, expected.state)


def test_going_back_equals_never_having_gone():
    """Rows by 3 and by 0 tokens; then other tokens, over a window of attention."""
    straight = run(HYBRID, PROMPTS, max_new_tokens=[21, 24], replay=8).state
    further = run(HYBRID, PROMPTS, max_new_tokens=24, replay=8)
    back = rewind(further.state, [3, 0])
    same(back, straight, 0)
    assert further.state.recent.depth.tolist() == [8, 8]
    assert back.recent.depth.tolist() == [5, 8]
    other = [[4, 4, 9], [8]]
    after = [run(HYBRID, other, max_new_tokens=20, state=state) for state in (back, straight)]
    assert after[0].tokens == after[1].tokens
    same(after[0].state, after[1].state)  # to rounding: further on the states had been written
    assert run(HYBRID, [[], []], max_new_tokens=3, state=rewind(further.state, 3)).tokens == [
        row[-3:] for row in further.tokens
    ]


def test_a_token_that_is_taken_back_was_not_seen():
    state = with_states(SMALL, prefill(SMALL, PROMPTS), replay=8)
    made = run(SMALL, [[], []], max_new_tokens=4, state=state)
    assert set(np.flatnonzero(made.state.seen[0])) == {1, 2, 3, *made.tokens[0]}
    back = rewind(made.state, 4)
    same(back, state, 0)
    assert set(np.flatnonzero(back.seen[0])) == {1, 2, 3}


def test_drafts_are_read_at_once_and_taken_back():
    """Speculative decoding: one call on a draft, then back to the tokens that are accepted."""
    cache = prefill(SMALL, PROMPTS).cache
    cache = (SMALL.layers[0].mixer.kept_cache(cache[0], replay=8),)
    draft = jnp.asarray([[9, 8, 7, 6, 5], [1, 2, 3, 4, 5]])
    _, after = call(SMALL, draft, cache)
    accepted = rewind_cache(after, jnp.asarray([2, 3]))
    logits, _ = call(SMALL, jnp.asarray([[11], [12]]), accepted)
    texts = [PROMPTS[0] + [9, 8, 7, 11], PROMPTS[1] + [1, 2, 12]]
    padded = jnp.asarray([row + [0] * (8 - len(row)) for row in texts])
    expected, _ = call(SMALL, padded, None)
    for row, text in enumerate(texts):
        assert_close(logits[row, 0], expected[row, len(text) - 1], 1e-5)


@pytest.mark.parametrize(("dtype", "replay"), [("bfloat16", None), ("float16_scaled", 8)])
def test_16_bits_go_through_everything(dtype, replay, tmp_path):
    """Prompts, generation, a file, more prompt; close to float32."""
    made = run(SMALL, PROMPTS, max_new_tokens=6, state_dtype=dtype, replay=replay)
    base = made.state.cache[0].state if replay is None else made.state.cache[0].state.base
    assert base.s.dtype == jnp.dtype(dtype.removesuffix("_scaled"))
    exact = with_states(SMALL, made.state, state_dtype="float32", replay=0)
    assert exact.cache[0].state.s.dtype == jnp.float32
    save_state(tmp_path / "state.npz", made.state, SMALL)
    loaded = load_state(tmp_path / "state.npz", SMALL)
    assert loaded.recent is None
    if replay is None:
        assert_close(loaded, made.state, 0)
    long = [list(range(20)), []]
    states = [prefill(SMALL, long, state=x) for x in (made.state, loaded, exact)]
    for state in states[:2]:
        assert_close(state.logits, states[2].logits, 0.01)
    assert jax.tree.structure(states[0]) == jax.tree.structure(made.state)
    assert kept_as(base_of(states[0])) == dtype


def base_of(state):
    kept = state.cache[0].state
    return getattr(kept, "base", kept)


def test_float32_is_what_it_was():
    state = prefill(SMALL, PROMPTS)
    assert with_states(SMALL, state, state_dtype="float32") is not None
    assert_close(with_states(SMALL, state, state_dtype="float32", replay=0), state, 0)
    start = initial_state(SMALL, 2)
    assert jax.tree.structure(start.cache) == jax.tree.structure(SMALL.init_cache(2))
    shapes = jax.eval_shape(lambda: SMALL.init_cache(2, state_dtype="bfloat16", replay=4))
    assert shapes[0].state.base.m.dtype == jnp.bfloat16


def test_unknown_tokens_are_taken_back_too():
    cache = SMALL.init_cache(1, replay=4)
    _, cache = call(SMALL, jnp.asarray([[3]]), cache)
    logits, broken = call(SMALL, jnp.asarray([[10**6]]), cache)
    assert np.isnan(logits).all()
    assert np.isnan(call(SMALL, jnp.asarray([[4]]), broken)[0]).all()
    mended = rewind_cache(broken, jnp.asarray([1]))
    expected = call(SMALL, jnp.asarray([[4]]), cache)[0]
    assert_close(call(SMALL, jnp.asarray([[4]]), mended)[0], expected, 0)


def test_what_does_not_fit_is_one_line():
    state = prefill(SMALL, PROMPTS)
    replayed = with_states(SMALL, state, replay=4)
    other = make(dataclasses.replace(TINY, mixer="gdn"))
    other_state = with_states(other, initial_state(other, 1), replay=4)
    calls = {
        "state: expected one of generate": lambda: rewind(state, 1),
        r"tokens: expected ints from 0 to 0, 0 .*, got 1": lambda: rewind(replayed, 1),
        r"tokens: expected ints from 0 to 0, 0 .*, got \[0\]": lambda: rewind(replayed, [0]),
        "state: expected layers of momentum": lambda: rewind(other_state, 0),
        "replay: expected 2, 4, 8 or 16, got 5": lambda: with_states(SMALL, state, replay=5),
        "replay: expected at least conv_size = 4": lambda: with_states(SMALL, state, replay=2),
        "state_dtype: expected one of": lambda: with_states(SMALL, state, state_dtype="int8"),
    }
    for words, call in calls.items():
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    ids = jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match="cache: expected an MDNCache with segment_ids, got a Re"):
        SMALL(jnp.ones((2, 3), jnp.int32), ids, replayed.cache)
