"""Every field of a request that does not fit is named, with what was expected and what came."""

import json

import pytest

from mdn_jax.serving.errors import RequestError
from mdn_jax.serving.limits import Limits
from mdn_jax.serving.protocol import Protocol

PROTOCOL = Protocol("tiny", 257, Limits(max_tokens=100, choices=8))

BAD = [
    ("[]", "body: expected a JSON object, got list"),
    ('{"prompt": "a", "tools": []}', r"tools: expected one of the fields .*prompt.*, got \[\]"),
    ("{}", "prompt: expected text, or token ids, or a list of either, got None"),
    ('{"prompt": null}', "prompt: expected text"),
    ('{"prompt": 3}', "prompt: expected text, or token ids, or a list of either, got 3"),
    ('{"prompt": []}', r"prompt: expected .*, got \[\]"),
    ('{"prompt": [[]]}', r"prompt: expected .*, got \[\]"),
    ('{"prompt": [1, "a"]}', "prompt: expected token ids from 0 to 256, got 'a'"),
    ('{"prompt": ["a", 1]}', "prompt: expected .*, got 1"),
    ('{"prompt": [257]}', "prompt: expected token ids from 0 to 256, got 257"),
    ('{"prompt": [true]}', "prompt: expected token ids from 0 to 256, got True"),
    ('{"prompt": "\\ud800"}', "prompt: expected Unicode text without lone surrogates"),
    ('{"prompt": ["a","a","a","a","a","a","a","a","a"]}', "prompt: expected at most 8 prompts"),
    ('{"prompt": ["a", "a", "a"], "n": 3}', "n: expected at most 8 answers .*, got 9"),
    ('{"prompt": "a", "model": "gpt-4"}', "model: expected 'tiny', got 'gpt-4'"),
    ('{"prompt": "a", "max_tokens": 101}', "max_tokens: expected an int from 0 to 100, got 101"),
    ('{"prompt": "a", "max_tokens": 0}', "max_tokens: expected an int >= 1"),
    ('{"prompt": "a", "max_tokens": 1.0}', "max_tokens: expected an int from 0 to 100, got 1.0"),
    ('{"prompt": "a", "n": 0}', "n: expected an int from 1 to 8, got 0"),
    ('{"prompt": "a", "n": true}', "n: expected an int from 1 to 8, got True"),
    ('{"prompt": "a", "best_of": 2}', r"best_of: expected n \(1\)"),
    ('{"prompt": "a", "temperature": -1}', "temperature: expected a number from 0 to 100, got -1"),
    ('{"prompt": "a", "temperature": NaN}', "temperature: expected a number .*, got nan"),
    ('{"prompt": "a", "temperature": "1"}', "temperature: expected a number .*, got '1'"),
    ('{"prompt": "a", "top_p": 0}', "top_p: expected a number above 0 to 1, got 0"),
    ('{"prompt": "a", "min_p": 2}', "min_p: expected a number from 0 to 1, got 2"),
    ('{"prompt": "a", "stream": 1}', "stream: expected true or false, got 1"),
    ('{"prompt": "a", "stream_options": {"include_usage": true}}', "stream_options: expected none"),
    ('{"prompt": "a", "stream": true, "stream_options": {"x": 1}}', "stream_options: expected an"),
    ('{"prompt": "a", "stop": ["a","b","c","d","e"]}', "stop: expected a string or at most 4"),
    ('{"prompt": "a", "stop": [""]}', "stop: expected strings of at least one character, got ''"),
    ('{"prompt": "a", "stop_token_ids": [-1]}', "stop_token_ids: expected token ids"),
    ('{"prompt": "a", "logprobs": 21}', "logprobs: expected an int from 0 to 20, got 21"),
    ('{"prompt": "a", "echo": true, "stream": true}', "echo: expected false with stream"),
    ('{"prompt": "a", "seed": 1e99}', "seed: expected an int"),
    ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias: expected token ids .*, got 'x'"),
    ('{"prompt": "a", "logit_bias": {"300": 1}}', "logit_bias: expected token ids .*, got 300"),
    ('{"prompt": "a", "logit_bias": {"1": 101}}', "logit_bias: expected a number .*, got 101"),
    ('{"prompt": "a", "presence_penalty": 1}', "presence_penalty: expected 0 .*, got 1"),
]

BAD_CHATS = [
    ("{}", "messages: expected a list of messages with role and content, got None"),
    ('{"messages": []}', "messages: expected a list"),
    ('{"messages": ["hi"]}', r"messages\[0\]: expected an object with role and content, got 'hi'"),
    ('{"messages": [{"role": "user"}]}', r"messages\[0\].content: expected a string, got None"),
    ('{"messages": [{"role": 1, "content": ""}]}', r"messages\[0\].role: expected a string, got 1"),
    ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', r"\.content: expected"),
    ('{"messages": [{"role": "user", "content": ""}], "prompt": ""}', "prompt: expected one of"),
    (
        '{"messages": [{"role": "user", "content": ""}], "top_logprobs": 2}',
        "top_logprobs: expected 0 without logprobs, got 2",
    ),
    (
        '{"messages": [{"role": "u", "content": ""}], "response_format": {"type": "json_object"}}',
        "response_format: expected {'type': 'text'}",
    ),
]


@pytest.mark.parametrize(("body", "message"), BAD)
def test_a_completion_that_does_not_fit(body, message):
    with pytest.raises(RequestError, match=f"^{message}") as caught:
        PROTOCOL.completion(json.loads(body))
    assert caught.value.status == (404 if "gpt-4" in body else 400)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 600


@pytest.mark.parametrize(("body", "message"), BAD_CHATS)
def test_a_chat_that_does_not_fit(body, message):
    with pytest.raises(RequestError, match=message) as caught:
        PROTOCOL.chat(json.loads(body))
    assert caught.value.status == 400
    assert caught.value.field


def test_what_is_not_said():
    asked = PROTOCOL.completion({"prompt": "a", "stop": None, "user": "me", "suffix": None})
    assert (asked.max_tokens, asked.n, asked.stop, asked.logprobs) == (16, 1, (), None)
    assert asked.sampling.temperature == 1.0
    chat = PROTOCOL.chat({"messages": [{"role": "user", "content": "a"}], "top_k": -1})
    assert (chat.max_tokens, chat.sampling.top_k) == (100, None)
    seeds = {PROTOCOL.completion({"prompt": "a"}).seed for _ in range(8)}
    assert len(seeds) == 8


def test_a_limit_that_does_not_fit():
    with pytest.raises(ValueError, match="slots: expected an int >= 1, got 0"):
        Limits(slots=0)
    with pytest.raises(ValueError, match="seconds: expected seconds >= 0, got inf"):
        Limits(seconds=float("inf"))
