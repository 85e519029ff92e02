"""The server under the `openai` package: the same texts as the library makes."""

import json

import jax
import jax.numpy as jnp
import openai
import pytest

from mdn_jax import Sampling, generate
from mdn_jax.text.text import ByteText
from tests.serving.running import NAME

TEXT = ByteText()
GREEDY = {"model": NAME, "temperature": 0}


def expected(model, prompt, count, *, seed=0, **sampling):
    """The library's continuation of a text or of token ids."""
    tokens = TEXT.encode(prompt) if isinstance(prompt, str) else prompt
    drawn = Sampling(vocab_limit=TEXT.vocab_limit, **sampling)
    made = generate(model, [tokens], max_new_tokens=count, sampling=drawn, seed=seed).tokens[0]
    return decoded(made)


def decoded(tokens):
    decoder = TEXT.decoder()
    return decoder.add(tokens) + decoder.finish()


def logprobs_of(model, tokens):
    """The log-probabilities of every next token, from the model's own call."""
    logits, _ = model(jnp.asarray([tokens]))
    return jax.nn.log_softmax(logits[0], axis=-1)


def test_a_completion_is_the_librarys(client, model):
    answer = client.completions.create(prompt="the sky is", max_tokens=20, **GREEDY)
    (choice,) = answer.choices
    assert choice.text == expected(model, "the sky is", 20, temperature=0.0)
    assert (choice.finish_reason, choice.index, answer.model) == ("length", 0, NAME)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (11, 20)


def test_a_seed_draws_the_librarys_text(client, model):
    drawn = {"temperature": 0.9, "top_p": 0.8}
    extra = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2}
    answer = client.completions.create(
        model=NAME, prompt="ab", max_tokens=12, seed=7, n=2, extra_body=extra, **drawn
    )
    wanted = [expected(model, "ab", 12, seed=seed, **drawn, **extra) for seed in (7, 8)]
    assert [choice.text for choice in answer.choices] == wanted
    assert wanted[0] != wanted[1]
    unseeded = [client.completions.create(model=NAME, prompt="ab", max_tokens=12) for _ in range(2)]
    assert unseeded[0].choices[0].text != unseeded[1].choices[0].text


def test_prompts_of_every_kind(client, model):
    ids = TEXT.encode("xy")
    for prompt in ("xy", ["xy", "z"], ids, [ids, TEXT.encode("z")]):
        answer = client.completions.create(prompt=prompt, max_tokens=6, **GREEDY)
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        wanted = [expected(model, p, 6, temperature=0.0) for p in ("xy", "z")[: 1 + several]]
        assert [choice.text for choice in answer.choices] == wanted
        assert answer.usage.prompt_tokens == 3 + 2 * several


def test_a_stream_joins_to_the_whole(client, model):
    options = {"prompt": "stream", "max_tokens": 40, "seed": 3, "model": NAME}
    whole = client.completions.create(**options)
    pieces = list(
        client.completions.create(stream=True, stream_options={"include_usage": True}, **options)
    )
    assert pieces[-1].usage.total_tokens == whole.usage.total_tokens
    assert pieces[-1].choices == []
    choices = [piece.choices[0] for piece in pieces[:-1]]
    assert len(choices) > 3
    assert "".join(choice.text for choice in choices) == whole.choices[0].text
    assert [c.finish_reason for c in choices] == [None] * (len(choices) - 1) + ["length"]


def test_a_stop_string_is_found_across_tokens_and_is_not_shown(client, model):
    text = expected(model, "stop", 60, temperature=0.0)
    place = next(i for i in range(10, 50) if text.find(text[i : i + 3]) == i)
    stop = text[place : place + 3]
    for stops in (stop, ["never comes", stop]):
        answer = client.completions.create(prompt="stop", max_tokens=60, stop=stops, **GREEDY)
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason) == (text[:place], "stop")
        assert answer.usage.completion_tokens < 60
    options = GREEDY | {"prompt": "stop", "max_tokens": 60, "stop": stop, "stream": True}
    pieces = [piece.choices[0] for piece in client.completions.create(**options)]
    assert "".join(piece.text for piece in pieces) == text[:place]
    assert pieces[-1].finish_reason == "stop"


def test_a_stop_token_ends_a_text_and_is_counted(client, model):
    tokens = generate(
        model,
        [TEXT.encode("end")],
        max_new_tokens=20,
        sampling=Sampling(temperature=0.0, vocab_limit=TEXT.vocab_limit),
    ).tokens[0]
    last = next(i for i in range(5, 20) if tokens.index(tokens[i]) == i)
    answer = client.completions.create(
        prompt="end", max_tokens=20, extra_body={"stop_token_ids": [tokens[last]]}, **GREEDY
    )
    assert answer.choices[0].text == decoded(tokens[:last])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == last + 1


def test_logprobs_are_the_models(client, model):
    prompt = TEXT.encode("lp")
    answer = client.completions.create(prompt=prompt, max_tokens=6, logprobs=3, seed=1, model=NAME)
    (choice,) = answer.choices
    table = choice.logprobs
    made = generate(
        model, [prompt], max_new_tokens=6, sampling=Sampling(vocab_limit=TEXT.vocab_limit), seed=1
    ).tokens[0]
    wide = logprobs_of(model, prompt + made)[len(prompt) - 1 : -1]
    wanted = [float(row[token]) for row, token in zip(wide, made, strict=True)]
    assert table.token_logprobs == pytest.approx(wanted, abs=2e-5)
    for row, top in zip(wide, table.top_logprobs, strict=True):
        assert sorted(top.values())[-3:] == pytest.approx(sorted(row.tolist())[-3:], abs=2e-5)
        assert len(top) in (3, 4)
    assert table.text_offset[0] == 0
    assert len(table.tokens) == 6


def test_echo_scores_the_prompt(client, model):
    prompts = [TEXT.encode("the quick brown fox jumps over the lazy dog"), TEXT.encode("ab")]
    asked = {"max_tokens": 1, "logprobs": 1, "echo": True, **GREEDY}
    answer = client.completions.create(prompt=prompts, **asked)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        table = choice.logprobs
        assert table.token_logprobs[0] is None
        wide = logprobs_of(model, prompt)
        wanted = [float(row[token]) for row, token in zip(wide, prompt[1:], strict=False)]
        assert table.token_logprobs[1:-1] == pytest.approx(wanted, abs=2e-5)
        likeliest = [max(top.values()) for top in table.top_logprobs[1:-1]]
        assert likeliest == pytest.approx(wide.max(-1)[:-1].tolist(), abs=2e-5)
        assert choice.text.startswith(decoded(prompt))
    silent = client.completions.create(prompt=prompts[1], **asked | {"max_tokens": 0})
    assert silent.choices[0].logprobs.token_logprobs == pytest.approx(
        answer.choices[1].logprobs.token_logprobs[:-1]
    )
    assert silent.choices[0].text == "ab"
    plain = client.completions.create(prompt="ab", max_tokens=2, echo=True, **GREEDY)
    assert plain.choices[0].text == "ab" + expected(model, "ab", 2, temperature=0.0)
    assert plain.choices[0].logprobs is None


def test_a_bias_rules_tokens_in_and_out(client):
    options = {"prompt": "b", "max_tokens": 4, "model": NAME, "seed": 0}
    answer = client.completions.create(logit_bias={"65": 100}, **options)
    assert answer.choices[0].text == "AAAA"


def test_a_chat_is_the_templates_text(client, model):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    prompt = "system: Be brief.\nuser: Hi\nassistant: "
    answer = client.chat.completions.create(messages=messages, max_tokens=15, **GREEDY)
    (choice,) = answer.choices
    assert choice.message.content == expected(model, prompt, 15, temperature=0.0)
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    parts = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, messages[1]]
    pieces = list(
        client.chat.completions.create(messages=parts, max_tokens=15, stream=True, **GREEDY)
    )
    deltas = [piece.choices[0].delta for piece in pieces]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content


def test_logprobs_of_a_chat(client):
    answer = client.chat.completions.create(
        messages=[{"role": "user", "content": "Hi"}],
        max_completion_tokens=5,
        logprobs=True,
        top_logprobs=2,
        **GREEDY,
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.logprob == entry.top_logprobs[0].logprob  # the likeliest, at temperature 0
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token


def test_models(client, running):
    (listed,) = client.models.list().data
    assert listed.id == NAME
    assert listed.state_bytes == running.engine.device.state_bytes > 0
    assert client.models.retrieve(NAME) == listed
    with pytest.raises(openai.NotFoundError, match="expected 'tiny', got 'other'"):
        client.models.retrieve("other")


def test_the_memory_of_a_prompt_is_used_again(client, running, model):
    system = "You are a very helpful assistant, who never tires of explaining what momentum is. "
    texts = []
    for question in ("What is it?", "How so?", "And then?"):
        answer = client.completions.create(prompt=system + question, max_tokens=8, **GREEDY)
        texts.append((question, answer))
    for question, answer in texts:
        wanted = expected(model, system + question, 8, temperature=0.0)
        assert answer.choices[0].text == wanted
    cached = [answer.usage.prompt_tokens_details.cached_tokens for _, answer in texts]
    # the second finds what was kept at a piece's end, the third where the first two part
    assert cached == [0, 64, 1 + len(system)]
    again = client.completions.create(prompt=system + "How so?", max_tokens=8, **GREEDY)
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens
    assert json.loads(again.model_dump_json())["choices"][0]["text"] == texts[1][1].choices[0].text
