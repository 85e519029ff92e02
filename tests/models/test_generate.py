"""Generation: every row as if it were alone, however it is cut."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MDNForCausalLM, Sampling, generate
from mdn_jax.models import initial_state, prefill, stream
from mdn_jax.models.blocks import decode_block
from tests.layers.helpers import BARE, TINY_ATTENTION, assert_close, call

FULL_ATTENTION = dataclasses.replace(TINY_ATTENTION, window_size=None)
CONFIGS = {
    "mdn": dataclasses.replace(BARE, num_hidden_layers=1),
    "windowed": dataclasses.replace(BARE, attn=TINY_ATTENTION),  # its first layer is that of "mdn"
    "full": dataclasses.replace(BARE, attn=FULL_ATTENTION),
}
MODELS = {
    name: MDNForCausalLM(config, implementation="scan", rngs=nnx.Rngs(0))
    for name, config in CONFIGS.items()
}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [3, 3, 3, 3]]
HYBRIDS = ["windowed", pytest.param("full", marks=pytest.mark.slow)]
GREEDY = Sampling(temperature=0.0)
# with these, 8 tokens a call, few programs are compiled
FEW = {"max_new_tokens": 9, "block": 8}


def rows(tree, *picked):
    return jax.tree.map(lambda x: x[jnp.asarray(picked)], tree)


@pytest.mark.parametrize("name", ["full", pytest.param("windowed", marks=pytest.mark.slow)])
def test_greedy_tokens_are_the_choices_of_the_whole_sequence(name):
    model = MODELS[name]
    piece = generate(model, [PROMPTS[0]], sampling=GREEDY, **FEW)
    assert len(piece.tokens[0]) == 9
    whole = jnp.asarray([PROMPTS[0] + piece.tokens[0]])
    logits, cache = call(model, whole)
    assert jnp.argmax(logits[0, 2:-1], axis=-1).tolist() == piece.tokens[0]
    assert_close(piece.state.logits, logits[:, -1])
    assert_close(piece.state.cache[0], cache[0])
    assert piece.state.position.tolist() == [12]
    assert np.flatnonzero(piece.state.seen[0]).tolist() == sorted(set(whole[0].tolist()))


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_prompt_in_a_batch_is_the_prompt_alone(name):
    model = MODELS[name]
    stop = (24, 25)
    together = generate(model, PROMPTS, stop_tokens=stop, seed=4, **FEW)
    assert len(set(map(len, together.tokens))) > 1  # some end, some do not
    for row in (0, 1, 2):
        alone = generate(model, [PROMPTS[row]], stop_tokens=stop, seed=4 + row, **FEW)
        assert alone.tokens[0] == together.tokens[row]
        assert alone.ended[0] == together.ended[row]
        assert_close(rows(together.state, row), alone.state)


def test_a_start_compiles_three_programs_at_most():
    config = dataclasses.replace(CONFIGS["mdn"], vocab_size=41)  # of no other test
    model = MDNForCausalLM(config, implementation="scan", rngs=nnx.Rngs(0))
    programs: list[str] = []

    def count(event, seconds, **names):
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(names.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        generate(model, [[1, 2, 3, 4, 5]] * 7, max_new_tokens=9, block=8)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert len(programs) <= 3, programs


def test_pieces_and_continued_states_are_one_run():
    model = MODELS["windowed"]
    state = prefill(model, PROMPTS)
    options = {"stop_tokens": (5,), "seed": 1}
    pieces = list(stream(model, state, **FEW, **options))
    assert [len(piece.tokens[0]) for piece in pieces] == [1, 8]
    first = generate(model, PROMPTS, max_new_tokens=4, block=8, **options)
    assert not any(first.ended)
    second = generate(model, [[], [], []], max_new_tokens=5, block=8, state=first.state, **options)
    joined = [a + b for a, b in zip(first.tokens, second.tokens, strict=True)]
    assert joined == [[token for p in pieces for token in p.tokens[row]] for row in range(3)]
    assert_close(second.state, pieces[-1].state)


@pytest.mark.parametrize("name", HYBRIDS)
def test_prompts_that_continue_a_state(name):
    model = MODELS[name]
    state = prefill(model, PROMPTS)
    continued = prefill(model, [[7, 7], [], [1]], state=state)
    whole = prefill(model, [[*PROMPTS[0], 7, 7], PROMPTS[1], [*PROMPTS[2], 1]])
    assert_close(continued.logits, whole.logits)
    assert continued.position.tolist() == whole.position.tolist() == [5, 7, 5]
    after = [
        generate(model, [[], [], []], state=s, sampling=GREEDY, **FEW) for s in (continued, whole)
    ]
    assert after[0].tokens == after[1].tokens
    assert_close(after[0].state, after[1].state)


@nnx.jit
def padded_call(model, tokens, cache, lengths):
    return model(tokens, None, cache, lengths)


def test_prefill_and_decoding_are_one_call_at_every_split():
    model, tokens = MODELS["windowed"], jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]])
    start = model.init_cache(1, 8)
    expected = call(model, tokens, None, start)
    for split in range(9):  # 0: decoding from an empty cache
        logits, cache = padded_call(model, tokens, start, jnp.asarray([split]))
        logits = logits[:, :split]
        for t in range(split, 8):
            one, cache = call(model, tokens[:, t : t + 1], None, cache)
            logits = jnp.concatenate([logits, one], axis=1)
        assert_close((logits, cache), expected)


def test_a_stop_token_is_the_last_of_its_row():
    model = MODELS["mdn"]
    free = generate(model, [PROMPTS[0]], seed=2, **FEW).tokens[0]
    stop = free[3]
    expected = free[: free.index(stop) + 1]
    piece = generate(model, [PROMPTS[0]], seed=2, stop_tokens=(stop,), **FEW)
    assert piece.tokens == [expected]
    assert piece.ended == [True]
    assert piece.state.position.tolist() == [3 + len(expected)]


def test_seeds():
    model = MODELS["mdn"]
    prompts = [PROMPTS[0]] * 3
    first, again, other = (generate(model, prompts, seed=s, **FEW).tokens for s in (0, 0, 7))
    assert first == again != other
    assert first[0] != first[1] != first[2]
    assert generate(model, prompts, seed=1, **FEW).tokens[:2] == first[1:]
    assert generate(model, prompts, seed=[2, 0, 1], **FEW).tokens == [first[2], *first[:2]]


def test_sampling_options_apply_in_the_loop():
    model = MODELS["mdn"]
    assert max(generate(model, PROMPTS, sampling=Sampling(vocab_limit=4), **FEW).tokens[0]) < 4
    distinct = Sampling(temperature=0.0, repetition_penalty=1e9)
    (tokens,) = generate(model, [[1]], sampling=distinct, **FEW).tokens
    positive = len(set(tokens))
    greedy = len(set(generate(model, [[1]], sampling=GREEDY, **FEW).tokens[0]))
    assert positive >= greedy


def test_memory_does_not_grow_with_the_position():
    model = MODELS["windowed"]
    short = generate(model, [PROMPTS[0]], max_new_tokens=3, block=8)
    long = generate(model, [PROMPTS[0]], max_new_tokens=200, block=8)

    def size(state):
        return sum(x.nbytes for x in jax.tree.leaves(state))

    assert size(short.state) == size(long.state)
    assert long.state.position.tolist() == [203]


def test_attention_to_everything_has_a_limit():
    message = r"max_length: expected at least 12 \(3 tokens so far and max_new_tokens = 9: layer 1"
    with pytest.raises(ValueError, match=message):
        generate(MODELS["full"], [PROMPTS[0]], max_length=11, **FEW)
    piece = generate(MODELS["full"], [PROMPTS[0]], max_length=12, **FEW)
    assert piece.state.cache[1].capacity == 64
    generate(MODELS["windowed"], [PROMPTS[0]], max_length=11, **FEW)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": []}, ["prompts", "at least one row"]),
        ({"prompts": [[1], []]}, ["prompts[1]", "at least one token"]),
        ({"prompts": [[31]]}, ["prompts[0]", "from 0 to 30", "31"]),
        ({"prompts": [[-1]]}, ["prompts[0]", "-1"]),
        ({"prompts": [[1.5]]}, ["prompts[0]", "token ids", "float64"]),
        ({"max_new_tokens": 0}, ["max_new_tokens", ">= 1", "0"]),
        ({"block": 0}, ["block", ">= 1", "0"]),
        ({"stop_tokens": (99,)}, ["stop_tokens", "from 0 to 30", "99"]),
        ({"seed": -1}, ["seed", "0 to 2^32", "-1"]),
        ({"seed": [1, 2]}, ["seed", "1 of them", "got 2"]),
        ({"seed": 2**70}, ["seed", "0 to 2^32", str(2**70)]),
        ({"seed": None}, ["seed", "0 to 2^32", "None"]),
        ({"seed": 1.0}, ["seed", "0 to 2^32", "1.0"]),
        ({"prompts": None}, ["prompts", "rows of token ids", "None"]),
        ({"prompts": [[[1], [1, 2]]]}, ["prompts[0]", "token ids"]),
        ({"prompts": ["ab"]}, ["prompts[0]", "token ids"]),
        ({"prompts": [True]}, ["prompts[0]", "token ids", "True"]),
        ({"max_new_tokens": 2.0}, ["max_new_tokens", ">= 1", "2.0"]),
        ({"max_new_tokens": "2"}, ["max_new_tokens", ">= 1", "'2'"]),
        ({"block": None}, ["block", ">= 1", "None"]),
        ({"stop_tokens": 3}, ["stop_tokens", "a list", "3"]),
        ({"stop_tokens": ("a",)}, ["stop_tokens", "a list"]),
        ({"max_length": 0}, ["max_length", ">= 1", "0"]),
        ({"sampling": 0.7}, ["sampling", "a Sampling", "0.7"]),
        ({"state": 1}, ["state", "a GenerationState", "int"]),
        ({"max_new_tokens": [1, 2]}, ["max_new_tokens", "1 of them (rows)", "got 2"]),
        ({"max_new_tokens": [0]}, ["max_new_tokens", ">= 1", "0"]),
        ({"max_new_tokens": [1.5]}, ["max_new_tokens", ">= 1", "float64"]),
        ({"stop_tokens": [[1], [2]]}, ["stop_tokens", "1 lists of them (rows)", "2 lists"]),
        ({"stop_tokens": [[99]]}, ["stop_tokens", "from 0 to 30", "99"]),
        ({"stop_tokens": [[1], 2]}, ["stop_tokens", "a list"]),
        ({"logprobs": -1}, ["logprobs", "from 0 to 31", "-1"]),
        ({"logprobs": 32}, ["logprobs", "from 0 to 31", "32"]),
    ],
)
def test_bad_arguments(options, words):
    options = {"prompts": [[1]], "max_new_tokens": 1} | options
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        generate(MODELS["mdn"], options.pop("prompts"), **options)
    for word in words:
        assert word in str(raised.value), str(raised.value)


@pytest.mark.parametrize("prompts", [np.array([[1, 2]]), jnp.array([[1, 2]]), ((1, 2),)])
def test_prompts_of_any_kind_of_list(prompts):
    state = prefill(MODELS["mdn"], prompts)
    assert np.flatnonzero(state.seen[0]).tolist() == [1, 2]


def test_logits_that_are_not_finite_are_an_error():
    model = nnx.clone(MODELS["mdn"])
    state = prefill(model, PROMPTS)
    bad = state._replace(logits=state.logits.at[1, 3].set(jnp.nan))
    message = "model: expected logits to draw from, got nan or inf after 7 tokens of row 1"
    with pytest.raises(ValueError, match=message):
        next(stream(model, bad, sampling=GREEDY, **FEW))
    # in the middle of a block: a token whose embedding is no number
    free = generate(model, PROMPTS[:1], sampling=GREEDY, **FEW).tokens[0]
    model.embeddings[...] = model.embeddings[...].at[free[4]].set(jnp.nan)
    after = 3 + free.index(free[4]) + 1
    with pytest.raises(ValueError, match=f"got nan or inf after {after} tokens of row 0"):
        generate(model, [[]], state=prefill(MODELS["mdn"], PROMPTS[:1]), sampling=GREEDY, **FEW)


def test_a_state_of_another_model():
    with pytest.raises(ValueError, match=r"state: expected one of this model \(1 layers, 31 tok"):
        prefill(MODELS["mdn"], [[1]], state=initial_state(MODELS["windowed"], 1))


def test_a_state_of_other_rows():
    state = initial_state(MODELS["mdn"], 2)
    with pytest.raises(ValueError, match=r"prompts: expected 2 rows \(as state\), got 1"):
        prefill(MODELS["mdn"], [[1]], state=state)


def test_the_loop_is_compiled_once():
    # parameters on a device by name, as those of a checkpoint are
    graph, weights = nnx.split(MODELS["mdn"])
    model = nnx.merge(graph, jax.device_put(weights, jax.devices()[0]))
    state = prefill(model, [PROMPTS[0]])
    before = decode_block(in_place=False, graphs=False)._cache_size()
    for _ in stream(model, state, max_new_tokens=20, block=6):
        pass
    assert decode_block(in_place=False, graphs=False)._cache_size() == before + 1
