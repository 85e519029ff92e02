"""Answers in OpenAI's format, whole or piece by piece."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol, override

from mdn_jax.serving.errors import RequestError
from mdn_jax.serving.jobs import Event, Job
from mdn_jax.serving.protocol import Request
from mdn_jax.serving.texts import Answer, Step, Texts


class Choice:
    """One answer as it grows.

    Args:
      index: of it in the response.
      job: that makes it.
      texts: of the tokens.
      request: what is asked for.
      opened: tokens of the job's prompt that the request's has not.

    Attributes:
      finish: why it ended: "stop" or "length"; None: it goes on.
      tokens: made so far, a stop token included.
      answer: its text.
      prompt: the text of the prompt and its tokens, for `echo`.
    """

    def __init__(
        self, index: int, job: Job, texts: Texts, request: Request, *, opened: int = 0
    ) -> None:
        self.index, self.job = index, job
        self.finish: str | None = None
        self.tokens = 0
        detailed = request.logprobs is not None
        self.answer = Answer(texts.text.decoder(job.prompt), request.stop, detailed=detailed)
        self.prompt: tuple[str, list[Step]] = ("", [])
        self._texts, self._opened = texts, opened
        if request.echo and not job.score_prompt:
            self.prompt = texts.steps(job.prompt[opened:])

    @property
    def ended(self) -> bool:
        """Whether there is no more of it."""
        return self.finish is not None

    def take(self, event: Event) -> str:
        """The text that an event adds.

        Raises:
          RequestError: the text ended otherwise than by a stop or its length.
        """
        if event.prompt is not None:
            own = slice(self._opened, None)
            drawn, likeliest = event.prompt.drawn[own], event.prompt.likeliest[own]
            self.prompt = self._texts.steps(self.job.prompt[own], drawn, likeliest)
        tokens, scores = event.tokens, event.scores
        by_token = event.end == "stop"
        shown = tokens[:-1] if by_token else tokens
        text = self.answer.add(
            shown, scores.drawn if scores else None, scores.likeliest if scores else None
        )
        self.tokens = self.answer.tokens + by_token
        if self.answer.stopped:
            self.finish = "stop"
        elif event.end in ("stop", "length"):
            text += self.answer.finish()
            self.finish = "stop" if self.answer.stopped else event.end
        elif event.end is not None:
            raise _failure(event)
        return text

    def new_steps(self) -> list[Step]:
        """Its tokens since the last call."""
        steps, self.answer.steps = self.answer.steps, []
        return steps


def _failure(event: Event) -> RequestError:
    if event.end == "timeout":
        return RequestError(504, "the request took longer than the server allows", code="timeout")
    if event.end == "cancelled":
        return RequestError(503, event.message or "the text was cancelled", code="cancelled")
    return RequestError(500, event.message, code="engine_error")


class Format(Protocol):
    """The shape of one kind of answers."""

    def chunk(self, choice: Choice, text: str, *, first: bool) -> dict[str, Any]:
        """A piece of a stream."""

    def whole(self, choice: Choice, text: str) -> dict[str, Any]:
        """A choice of a response."""


class Envelope:
    """What all pieces of a response have in common.

    Args:
      kind: of a response, `object` in it.
      piece: of a piece of a stream.
      prefix: of its id.
      model: name of the model.
    """

    def __init__(self, kind: str, piece: str, prefix: str, model: str) -> None:
        self._kind, self._piece = kind, piece
        self._common = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def response(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """A whole response."""
        return self._common | {"object": self._kind, "choices": choices, "usage": usage}

    def event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        """A piece of a stream."""
        body = self._common | {"object": self._piece, "choices": choices, "usage": usage}
        return sse(body)


DONE = b"data: [DONE]\n\n"


def sse(body: dict[str, Any]) -> bytes:
    """An event of a stream."""
    return b"data: " + encoded(body) + b"\n\n"


def encoded(body: Any) -> bytes:
    """JSON; what is no number in it is an error, as no client could read it."""
    return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def usage_of(request: Request, prompts: Sequence[Sequence[int]], choices: Sequence[Choice]) -> Any:
    """Numbers of tokens: a prompt counts once, however many answers it has."""
    prompt = sum(map(len, prompts))
    made = sum(choice.tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {
            "cached_tokens": sum(choice.job.cached for choice in choices[:: request.n])
        },
    }


class CompletionFormat(Format):
    """Of `/v1/completions`."""

    def __init__(self, texts: Texts, *, logprobs: bool) -> None:
        self._texts, self._logprobs = texts, logprobs

    @override
    def chunk(self, choice: Choice, text: str, *, first: bool) -> dict[str, Any]:
        return self._choice(choice, text, choice.new_steps())

    @override
    def whole(self, choice: Choice, text: str) -> dict[str, Any]:
        before, steps = choice.prompt
        moved = [s._replace(offset=s.offset + len(before)) for s in choice.new_steps()]
        return self._choice(choice, before + text, steps + moved)

    def _choice(self, choice: Choice, text: str, steps: list[Step]) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": text,
            "logprobs": self._table(steps) if self._logprobs else None,
            "finish_reason": choice.finish,
        }

    def _table(self, steps: Sequence[Step]) -> dict[str, Any]:
        name = self._texts.name_of
        return {
            "tokens": [name(step.token) for step in steps],
            "token_logprobs": [step.logprob for step in steps],
            "top_logprobs": [self._top(step) for step in steps],
            "text_offset": [step.offset for step in steps],
        }

    def _top(self, step: Step) -> dict[str, float] | None:
        """The likeliest tokens and the one that came, which may be none of them."""
        if step.logprob is None:
            return None
        top: dict[str, float] = {}
        for token, logprob in [*step.top, (step.token, step.logprob)]:
            top.setdefault(self._texts.name_of(token), logprob)
        return top


class ChatFormat(Format):
    """Of `/v1/chat/completions`."""

    def __init__(self, texts: Texts, *, logprobs: bool) -> None:
        self._texts, self._logprobs = texts, logprobs

    @override
    def chunk(self, choice: Choice, text: str, *, first: bool) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text or first:
            delta["content"] = text
        return self._choice(choice) | {"delta": delta}

    @override
    def whole(self, choice: Choice, text: str) -> dict[str, Any]:
        return self._choice(choice) | {"message": {"role": "assistant", "content": text}}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        steps = choice.new_steps()
        logprobs = None
        if self._logprobs:
            content = [
                self._entry(step.token, step.logprob)
                | {"top_logprobs": [self._entry(*pair) for pair in step.top]}
                for step in steps
            ]
            logprobs = {"content": content, "refusal": None}
        return {"index": choice.index, "logprobs": logprobs, "finish_reason": choice.finish}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        name = self._texts.name_of(token)
        known = not name.startswith("token_id:")
        return {
            "token": name,
            "logprob": logprob,
            "bytes": list(name.encode()) if known else None,
        }
