"""What a server does not take, and what happens to it then: raw HTTP, with a small server."""

import http.client
import json
import socket
import threading
import time

import jax.numpy as jnp
import openai
import pytest
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.serving.device import Device
from mdn_jax.serving.limits import Limits
from tests.serving.running import NAME, server
from tests.serving.test_completions import expected
from tests.tiny import TINY_MODEL

KEY = "a secret"
LIMITS = Limits(
    slots=1,
    queue=2,
    prompt_tokens=200,
    max_tokens=100_000,
    choices=8,
    body_bytes=10_000,
    drain_seconds=0.5,
)
GREEDY = {"model": NAME, "temperature": 0}
NAN = 7
"""A byte after which this model's logits are nan."""


@pytest.fixture(scope="module")
def small(model):
    broken = nnx.clone(model)
    broken.embeddings[...] = broken.embeddings[...].at[NAN].set(jnp.nan)
    with server(broken, LIMITS, api_key=KEY, engine={"prefix_bytes": 0}) as running:
        yield running


@pytest.fixture
def keyed(small):
    with small.client(api_key=KEY) as client:
        yield client


def ask(running, method, path, body=None, **headers):
    """Status, headers and JSON of the answer to a raw request."""
    headers = {"Authorization": f"Bearer {KEY}", "Content_Type": "application/json"} | headers
    headers = {name.replace("_", "-"): x for name, x in headers.items() if x is not None}
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        data = response.read()
    finally:
        connection.close()
    is_json = response.headers["content-type"] == "application/json"
    return response.status, response.headers, json.loads(data) if is_json else data


def error_of(*arguments, **headers):
    status, _, body = ask(*arguments, **headers)
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return status, body["error"]["message"]


def test_a_key_is_asked_for(small):
    for header in (None, "Bearer another", KEY, "Bearer ä"):
        status, headers, body = ask(small, "GET", "/v1/models", Authorization=header)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert body["error"]["code"] == "invalid_api_key"
        assert KEY not in body["error"]["message"]
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert ask(small, "POST", path, "{}", Authorization=None)[0] == 401
    for path in ("/", "/health", "/metrics"):
        assert ask(small, "GET", path, Authorization=None)[0] == 200
    with small.client() as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd",
        "/..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/page.html",
        "/static/../page.html",
        "/v1/models/../../app.py",
        "/%00",
    ],
)
def test_no_file_is_reached(small, path):
    status, message = error_of(small, "GET", path)
    assert status == 404
    assert "root:" not in message


def test_a_method_that_is_none(small):
    status, headers, _ = ask(small, "GET", "/v1/completions")
    assert (status, headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "body: expected JSON"),
        (b"", 400, "body: expected JSON"),
        (b'{"prompt": "\xff"}', 400, "body: expected JSON"),
        (b"[" * 9_000, 400, "body: expected JSON"),
        (b'{"prompt": 1' + b"0" * 5_000 + b"}", 400, "body: expected JSON"),
        (b'"text"', 400, "body: expected a JSON object, got str"),
        (b'{"prompt": "' + b"a" * 10_000 + b'"}', 413, "body: expected at most 10000 bytes"),
        (b'{"prompt": "' + b"a" * 300 + b'"}', 400, "prompt: expected at most 200 tokens, got 301"),
    ],
)
def test_a_body_that_does_not_fit(small, body, status, message):
    got, said = error_of(small, "POST", "/v1/completions", body)
    assert (got, said[: len(message)]) == (status, message)


def test_a_body_without_a_length_is_bounded_too(small):
    sent = (b"a" * 5_000 for _ in range(5))
    status, _ = error_of(small, "POST", "/v1/completions", sent)
    assert status == 413


def test_only_json_is_taken(small):
    for kind in (None, "text/plain", "application/x-www-form-urlencoded"):
        status, message = error_of(small, "POST", "/v1/completions", "{}", Content_Type=kind)
        assert status == 415
        assert message.startswith("Content-Type: expected application/json, got")


def test_a_full_queue_says_so_and_a_gone_reader_frees_its_slot(small, keyed):
    long = {"prompt": "x", "max_tokens": 100_000, "stream": True, **GREEDY}
    with keyed.completions.create(**long) as first:
        next(first)
        assert small.engine.active == 1
        with pytest.raises(openai.RateLimitError, match="at most 2 waiting texts") as caught:
            keyed.completions.create(prompt="x", n=3, **GREEDY)
        assert caught.value.response.headers["retry-after"] == "1"
        assert small.engine.waiting == 0  # all of them, or none
        answers = []
        waits = threading.Thread(
            target=lambda: answers.append(keyed.completions.create(prompt="x", n=2, **GREEDY))
        )
        waits.start()
        while small.engine.waiting < 2:
            time.sleep(0.005)
        with pytest.raises(openai.RateLimitError):
            keyed.completions.create(prompt="x", **GREEDY)
    waits.join()
    small.idle()
    assert answers[0].usage.completion_tokens == 2 * 16


def test_a_client_that_goes_while_it_waits_leaves_nothing(small):
    body = json.dumps({"prompt": "x", "max_tokens": 100_000} | GREEDY).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    before = small.engine.metrics.registry.get_sample_value("mdn_texts_total", {"end": "cancelled"})
    sockets = [socket.create_connection(("127.0.0.1", small.port)) for _ in range(3)]
    for opened in sockets:
        opened.sendall(head + body)
    while small.engine.active + small.engine.waiting < 3:
        time.sleep(0.005)
    for opened in sockets:
        opened.close()
    small.idle()
    after = small.engine.metrics.registry.get_sample_value("mdn_texts_total", {"end": "cancelled"})
    assert after - (before or 0) == 3


def test_logits_that_are_nan_fail_one_request(small, keyed):
    good = {"prompt": "good", "max_tokens": 5, **GREEDY}
    before = keyed.completions.create(**good).choices[0].text
    for more in ({}, {"logprobs": 1, "echo": True}, {"stream": True}):
        with pytest.raises(openai.InternalServerError, match="expected finite logits"):
            keyed.completions.create(prompt=[1, NAN, 2], max_tokens=5, **GREEDY, **more)
    assert keyed.completions.create(**good).choices[0].text == before


def test_nan_that_a_text_itself_comes_to(keyed):
    options = {"prompt": "a", "max_tokens": 50, "logit_bias": {str(NAN): 100}, **GREEDY}
    with pytest.raises(openai.InternalServerError, match="expected finite logits"):
        keyed.completions.create(stream=True, **options)


def test_health_and_metrics(small):
    status, _, body = ask(small, "GET", "/health")
    assert (status, body) == (200, {"status": "ready", "active": 0, "waiting": 0})
    _, headers, text = ask(small, "GET", "/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if line[0] != "#")
    assert float(lines["mdn_slots"]) == 1
    assert float(lines["mdn_state_bytes"]) == small.engine.device.state_bytes
    assert float(lines['mdn_texts_total{end="error"}']) >= 1
    assert float(lines['mdn_requests_total{path="other",status="404"}']) >= 1


def test_the_tokens_of_a_text(small):
    wanted = {"eos_token": None, "bos_token": None, "vocab_size": 257}
    assert ask(small, "GET", "/tokenizer_info")[2] == wanted
    for opens, first in ((True, [256]), (False, [])):
        body = json.dumps({"prompt": "aé", "add_special_tokens": opens})
        tokens = ask(small, "POST", "/tokenize", body)[2]["tokens"]
        assert tokens == [*first, 97, 195, 169]
        body = json.dumps({"tokens": tokens})
        assert ask(small, "POST", "/detokenize", body)[2] == {"prompt": "aé"}
    assert error_of(small, "POST", "/tokenize", "{}")[0] == 400


def test_a_request_that_takes_too_long(model):
    limits = Limits(slots=1, seconds=0.3, max_tokens=100_000)
    with server(model, limits) as running, running.client() as client:
        long = {"prompt": "x", "max_tokens": 100_000, **GREEDY}
        with pytest.raises(openai.InternalServerError, match="longer than") as caught:
            client.completions.create(**long)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="longer than"):
            list(client.completions.create(stream=True, **long))
        running.idle()
        running.engine.drain()
        with pytest.raises(openai.InternalServerError, match="is draining") as caught:
            client.completions.create(prompt="x", **GREEDY)
        assert caught.value.status_code == 503
        assert ask(running, "GET", "/health")[0] == 503


def test_a_model_that_attends_to_all_has_room_for_so_many_tokens(monkeypatch):
    monkeypatch.setattr(Device, "warm", lambda self: None)  # half of it is not needed
    config = MDNConfig(
        **TINY_MODEL | {"num_hidden_layers": 2, "other_mixer": "attention", "other_layers": (1,)}
    )
    model = MDNForCausalLM(config, implementation="xla", rngs=nnx.Rngs(0))
    chat = [{"role": "user", "content": "a"}]
    with server(model, max_length=40) as running, running.client() as client:
        assert running.engine.device.limited
        for count, prompt in ((32, "12345678"), (1, "a" * 40)):
            with pytest.raises(openai.BadRequestError, match=r"max_tokens: expected at most \d+"):
                client.completions.create(
                    prompt=[256, *prompt.encode()], max_tokens=count, **GREEDY
                )
        answer = client.completions.create(prompt="12345678", max_tokens=31 - 1, **GREEDY)
        wanted = expected(model, "12345678", 30, temperature=0.0)
        assert answer.choices[0].text == wanted
        filled = client.chat.completions.create(messages=chat, **GREEDY)
        assert filled.usage.total_tokens == 40
