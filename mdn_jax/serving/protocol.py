"""Requests of OpenAI's completions and chat completions, checked field by field.

Beside OpenAI's fields there are those that other servers have too: `top_k`, `min_p`,
`repetition_penalty`, `stop_token_ids`, `ignore_eos`.
"""

import secrets
from dataclasses import dataclass, field
from typing import Any

from mdn_jax.models import Sampling
from mdn_jax.serving.errors import RequestError, unfit
from mdn_jax.serving.fields import (
    Reader,
    anything,
    flag,
    number,
    one_of,
    read_fields,
    string,
    whole,
)
from mdn_jax.serving.jobs import MOST_STOP_TOKENS
from mdn_jax.serving.limits import Limits

MOST_STOPS = 4
MOST_LOGPROBS = 20
_SEEDS = 2**32
_TOKENS = 16
"""Tokens of a completion whose request does not say, as OpenAI's interface has it."""

Prompt = str | list[int]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for, of either kind.

    Attributes:
      prompts: of a completion, text or token ids each.
      messages: of a chat, in place of prompts.
      max_tokens: most tokens of each answer.
      sampling: how tokens are drawn.
      seed: of the first answer; the next have the next seeds.
      n: answers to each prompt.
      stop: strings that end an answer and are not shown.
      stop_tokens: token ids that do.
      ignore_end: whether an answer goes on behind the tokenizer's end token.
      stream: whether pieces are sent as they are made.
      usage: whether a stream ends with the numbers of tokens.
      usage_always: whether every piece of it has them so far.
      logprobs: likeliest tokens to tell at each step, 0 included; None: no log-probabilities.
      echo: whether a completion begins with its prompt.
    """

    prompts: tuple[Prompt, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    max_tokens: int = _TOKENS
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_end: bool = False
    stream: bool = False
    usage: bool = False
    usage_always: bool = False
    logprobs: int | None = None
    echo: bool = False


class Protocol:
    """Reads requests for one model.

    Args:
      name: of the model, which a request may leave out.
      vocab_size: token ids are below it.
      limits: of the server.
    """

    def __init__(self, name: str, vocab_size: int, limits: Limits) -> None:
        self._name, self._vocab, self._limits = name, vocab_size, limits
        common = self._common()
        self._completion = common | {
            "prompt": self._prompts,
            "max_tokens": whole(0, limits.max_tokens),
            "logprobs": whole(0, MOST_LOGPROBS),
            "echo": flag,
            "suffix": one_of(""),
            "best_of": whole(1, limits.choices),
        }
        self._chat = common | {
            "messages": _messages,
            "max_tokens": whole(1, limits.max_tokens),
            "max_completion_tokens": whole(1, limits.max_tokens),
            "logprobs": flag,
            "top_logprobs": whole(0, MOST_LOGPROBS),
            "response_format": one_of({"type": "text"}),
            "modalities": one_of(["text"]),
        }

    def completion(self, body: Any) -> Request:
        """Reads the body of a completion.

        Raises:
          RequestError: a field that does not fit, by name.
        """
        found = read_fields(body, self._completion)
        if "prompt" not in found:
            raise unfit("prompt", "text, or token ids, or a list of either", None)
        request = self._request(
            found,
            prompts=found["prompt"],
            max_tokens=found.get("max_tokens", min(_TOKENS, self._limits.max_tokens)),
            logprobs=found.get("logprobs"),
            echo=found.get("echo", False),
        )
        if found.get("best_of", request.n) != request.n:
            raise unfit("best_of", f"n ({request.n}), as no answers are chosen", found["best_of"])
        if not request.max_tokens and not request.echo:
            raise unfit("max_tokens", "an int >= 1 (0 with echo only)", 0)
        if request.echo and request.stream:
            raise unfit("echo", "false with stream", True)
        return request

    def chat(self, body: Any) -> Request:
        """Reads the body of a chat completion.

        Raises:
          RequestError: a field that does not fit, by name.
        """
        found = read_fields(body, self._chat)
        if "messages" not in found:
            raise unfit("messages", "a list of messages with role and content", None)
        wanted, top = found.get("logprobs", False), found.get("top_logprobs", 0)
        if top and not wanted:
            raise unfit("top_logprobs", "0 without logprobs", top)
        most = self._limits.max_tokens
        return self._request(
            found,
            messages=found["messages"],
            max_tokens=found.get("max_completion_tokens", found.get("max_tokens", most)),
            logprobs=top if wanted else None,
        )

    def _common(self) -> dict[str, Reader]:
        return {
            "model": self._model,
            "stream": flag,
            "stream_options": _stream_options,
            "n": whole(1, self._limits.choices),
            "seed": whole(-(2**63), 2**63 - 1),
            "stop": _stops,
            "temperature": number(0, 100),
            "top_p": number(0, 1, above=True),
            "top_k": whole(-1, self._vocab),
            "min_p": number(0, 1),
            "repetition_penalty": number(0, 100, above=True),
            "logit_bias": self._logit_bias,
            "stop_token_ids": self._stop_tokens,
            "ignore_eos": flag,
            "frequency_penalty": one_of(0),
            "presence_penalty": one_of(0),
            "user": anything,
            "metadata": anything,
            "store": one_of(False),
        }

    def _request(self, found: dict[str, Any], **own: Any) -> Request:
        options = found.get("stream_options", {})
        if options and not found.get("stream"):
            raise unfit("stream_options", "none without stream", options)
        top_k = found.get("top_k", 0)
        names = ("temperature", "top_p", "min_p", "repetition_penalty", "logit_bias")
        request = Request(
            sampling=Sampling(
                top_k=top_k if top_k > 0 else None, **{x: found[x] for x in names if x in found}
            ),
            seed=found.get("seed", secrets.randbits(32)) % _SEEDS,
            n=found.get("n", 1),
            stop=found.get("stop", ()),
            stop_tokens=found.get("stop_token_ids", ()),
            ignore_end=found.get("ignore_eos", False),
            stream=found.get("stream", False),
            usage=options.get("include_usage", False),
            usage_always=options.get("continuous_usage_stats", False),
            **own,
        )
        texts = request.n * max(1, len(request.prompts))
        if texts > self._limits.choices:
            raise unfit("n", f"at most {self._limits.choices} answers (prompts times n)", texts)
        return request

    def _model(self, name: str, value: Any) -> str:
        if value != self._name:
            message = f"model: expected {self._name!r}, got {value!r:.80}"
            raise RequestError(404, message, field=name, code="model_not_found")
        return self._name

    def _prompts(self, name: str, value: Any) -> tuple[Prompt, ...]:
        expected = "text, or token ids, or a list of either"
        several = isinstance(value, list) and value and isinstance(value[0], str | list)
        prompts = value if several else [value]
        if len(prompts) > self._limits.choices:
            raise unfit(name, f"at most {self._limits.choices} prompts", len(prompts))
        for prompt in prompts:
            if isinstance(prompt, str):
                string(name, prompt)
            elif isinstance(prompt, list) and prompt:
                self._ids(name, prompt)
            else:
                raise unfit(name, expected, prompt)
        return tuple(prompts)

    def _stop_tokens(self, name: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or len(value) > MOST_STOP_TOKENS:
            raise unfit(name, f"a list of at most {MOST_STOP_TOKENS} token ids", value)
        return tuple(self._ids(name, value))

    def token_ids(self, name: str, value: Any) -> list[int]:
        """Reads a list of token ids."""
        if not isinstance(value, list):
            raise unfit(name, "a list of token ids", value)
        return self._ids(name, value)

    def _ids(self, name: str, tokens: list[Any]) -> list[int]:
        for token in tokens:
            if type(token) is not int or not 0 <= token < self._vocab:
                raise unfit(name, f"token ids from 0 to {self._vocab - 1}", token)
        return tokens

    def _logit_bias(self, name: str, value: Any) -> dict[int, float]:
        if not isinstance(value, dict):
            raise unfit(name, "an object of numbers by token ids", value)
        read, found = number(-100, 100), dict[int, float]()
        for key, bias in value.items():
            if not (isinstance(key, str) and key.isascii() and key.isdigit()):
                raise unfit(name, f"token ids from 0 to {self._vocab - 1}", key)
            (token,) = self._ids(name, [int(key[:12])])
            found[token] = read(name, bias)
        return found


def _stops(name: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise unfit(name, f"a string or at most {MOST_STOPS} of them", value)
    for stop in stops:
        if not string(name, stop):
            raise unfit(name, "strings of at least one character", stop)
    return tuple(stops)


def _stream_options(name: str, value: Any) -> dict[str, bool]:
    known = {"include_usage", "continuous_usage_stats"}
    if not isinstance(value, dict) or not value.keys() <= known:
        raise unfit(name, "an object with include_usage, continuous_usage_stats", value)
    return {key: flag(f"{name}.{key}", x) for key, x in value.items()}


def _messages(name: str, value: Any) -> tuple[dict[str, Any], ...]:
    expected = "a list of messages with role and content, both strings"
    if not isinstance(value, list) or not value:
        raise unfit(name, expected, value)
    messages = []
    for i, message in enumerate(value):
        place = f"{name}[{i}]"
        if not isinstance(message, dict) or not message.keys() <= {"role", "content", "name"}:
            raise unfit(place, "an object with role and content", message)
        content = message.get("content")
        if isinstance(content, list):  # of parts, as clients write it too
            if not all(isinstance(x, dict) and x.keys() == {"type", "text"} for x in content):
                raise unfit(f"{place}.content", "text, or parts with type and text", content)
            for x in content:
                one_of("text")(f"{place}.content", x["type"])
            content = "".join(string(f"{place}.content", x["text"]) for x in content)
        role = string(f"{place}.role", message.get("role"))
        messages.append({"role": role, "content": string(f"{place}.content", content)})
        if message.get("name") is not None:
            messages[-1]["name"] = string(f"{place}.name", message["name"])
    return tuple(messages)
