"""The paths of the server."""

import asyncio
import hmac
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from importlib.resources import files
from typing import Any, override

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mdn_jax.errors import RunError
from mdn_jax.serving.engine import Engine, NotReadyError, QueueFullError
from mdn_jax.serving.errors import RequestError, unfit
from mdn_jax.serving.exchange import ClientGoneError, Exchange
from mdn_jax.serving.fields import flag, one_of, read_fields, string
from mdn_jax.serving.jobs import Job
from mdn_jax.serving.limits import Limits
from mdn_jax.serving.protocol import Protocol, Request
from mdn_jax.serving.responses import (
    ChatFormat,
    Choice,
    CompletionFormat,
    Envelope,
    Format,
    encoded,
)
from mdn_jax.serving.texts import Texts

_BODY_SECONDS = 30.0
"""That a client may take to send its body."""

_NOBODY = 499
"""Status of what nobody reads any more, for the counters."""


class Service:
    """Answers requests with the texts that an engine makes.

    Args:
      engine: that makes them.
      texts: of its tokens.
      name: of the model.
      limits: of the server.
      api_key: that requests under `/v1` and for tokens have to have; None: none.
      open_prompts: whether a prompt of token ids that does not begin with the tokens which open a
        document gets them; answers show it as it came.
      page: what is shown at `/`; None: the page that comes with the package.
    """

    def __init__(
        self,
        engine: Engine,
        texts: Texts,
        *,
        name: str,
        limits: Limits,
        max_length: int | None = None,
        api_key: str | None = None,
        open_prompts: bool = False,
        page: str | None = None,
    ) -> None:
        self.engine = engine
        self._texts, self._name, self._limits = texts, name, limits
        self._max_length, self._open_prompts = max_length, open_prompts
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._protocol = Protocol(name, engine.device.model.config.vocab_size, limits)
        self._page = page or files("mdn_jax.serving").joinpath("page.html").read_text("utf-8")

    def app(self) -> ASGIApp:
        """All paths, with requests counted."""
        routes = [
            Route("/", self._show_page),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._for_all(self._models)),
            Route("/v1/models/{name:path}", self._for_all(self._model)),
            Route("/v1/completions", self._for_all(self._completions), methods=["POST"]),
            Route("/v1/chat/completions", self._for_all(self._chat), methods=["POST"]),
            Route("/tokenizer_info", self._for_all(self._tokenizer)),
            Route("/tokenize", self._for_all(self._tokenize), methods=["POST"]),
            Route("/detokenize", self._for_all(self._detokenize), methods=["POST"]),
        ]

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            self.engine.run_soon = asyncio.get_running_loop().call_soon_threadsafe
            yield

        handlers: dict[Any, Any] = {HTTPException: _http_error, Exception: _own_error}
        app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
        paths = {route.path for route in routes} - {"/v1/models/{name:path}"}
        return self._counted(app, paths)

    def _counted(self, app: ASGIApp, paths: set[str]) -> ASGIApp:
        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_and_count(message: Message) -> None:
                if message["type"] == "http.response.start":
                    path = scope["path"] if scope["path"] in paths else "other"
                    status = str(message["status"])
                    self.engine.metrics.requests.labels(path, status).inc()
                await send(message)

            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            await app(scope, receive, send_and_count)

        return counted

    def _for_all(
        self, endpoint: Callable[[HTTPRequest], Awaitable[Response]]
    ) -> Callable[[HTTPRequest], Awaitable[Response]]:
        """An endpoint behind the key, with its errors as responses."""

        async def checked(request: HTTPRequest) -> Response:
            try:
                self._check_key(request)
                return await endpoint(request)
            except RequestError as error:
                return _json(error.body(), error.status, error.headers)
            except RunError as error:  # text that the tokenizer cannot take
                return _json(RequestError(400, str(error)).body(), 400)
            except (ClientGoneError, ClientDisconnect):
                return Response(status_code=_NOBODY)

        return checked

    def _check_key(self, request: HTTPRequest) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if self._key is not None and not hmac.compare_digest(given, self._key):
            raise RequestError(
                401,
                "Authorization: expected 'Bearer' with the server's API key, got "
                + ("another" if given else "none"),
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _show_page(self, request: HTTPRequest) -> Response:
        policy = (
            "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; "
            "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        return HTMLResponse(self._page, headers={"Content-Security-Policy": policy})

    async def _health(self, request: HTTPRequest) -> Response:
        engine = self.engine
        body = {"status": engine.status, "active": engine.active, "waiting": engine.waiting}
        return _json(body, 200 if engine.status == "ready" else 503)

    async def _metrics(self, request: HTTPRequest) -> Response:
        text = self.engine.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, request: HTTPRequest) -> Response:
        return _json({"object": "list", "data": [self._described()]})

    async def _model(self, request: HTTPRequest) -> Response:
        if request.path_params["name"] != self._name:
            raise RequestError(
                404,
                f"model: expected {self._name!r}, got {request.path_params['name']!r:.80}",
                field="model",
                code="model_not_found",
            )
        return _json(self._described())

    def _described(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": 0,
            "owned_by": "mdn-jax",
            "state_bytes": self.engine.device.state_bytes,
            "max_model_len": self._max_length,
        }

    async def _completions(self, request: HTTPRequest) -> Response:
        asked = self._protocol.completion(await self._body(request))
        prompts = await asyncio.to_thread(self._prompts, asked)
        kind = CompletionFormat(self._texts, logprobs=asked.logprobs is not None)
        envelope = Envelope("text_completion", "text_completion", "cmpl", self._name)
        return await self._answer(request, asked, prompts, kind, envelope)

    async def _chat(self, request: HTTPRequest) -> Response:
        asked = self._protocol.chat(await self._body(request))
        prompt = await asyncio.to_thread(self._texts.chat, asked.messages)
        kind = ChatFormat(self._texts, logprobs=asked.logprobs is not None)
        piece, name = "chat.completion.chunk", self._name
        envelope = Envelope("chat.completion", piece, "chatcmpl", name)
        return await self._answer(request, asked, [prompt], kind, envelope)

    def _prompts(self, asked: Request) -> list[list[int]]:
        return [x if isinstance(x, list) else self._texts.prompt(x) for x in asked.prompts]

    async def _answer(
        self,
        request: HTTPRequest,
        asked: Request,
        prompts: list[list[int]],
        kind: Format,
        envelope: Envelope,
    ) -> Response:
        opened = [self._texts.opened(x) if self._open_prompts else x for x in prompts]
        choices = []
        for index in range(len(prompts) * asked.n):
            prompt = opened[index // asked.n]
            job = self._job(asked, prompt, index)
            extra = len(prompt) - len(prompts[index // asked.n])
            choices.append(Choice(index, job, self._texts, asked, opened=extra))
        exchange = Exchange(self.engine, asked, prompts, choices, kind, envelope)
        try:
            self.engine.submit([choice.job for choice in choices])
        except QueueFullError:
            raise RequestError(
                429,
                f"expected at most {self._limits.queue} waiting texts, got more: try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            ) from None
        except NotReadyError as error:
            raise RequestError(
                503,
                f"expected a server that is ready, got one that is {error}",
                code=f"server_{error}",
                headers={"Retry-After": "5"},
            ) from None
        if not asked.stream:
            return Response(await exchange.answer(request.receive), media_type=_JSON)
        pieces = exchange.stream(request.receive)
        try:
            first = await anext(pieces)
        except BaseException:
            await pieces.aclose()
            raise
        return _EventStream(first, pieces)

    def _job(self, asked: Request, prompt: list[int], index: int) -> Job:
        most = self._limits.prompt_tokens
        if len(prompt) > most:
            raise RequestError(
                400,
                f"prompt: expected at most {most} tokens, got {len(prompt)}",
                field="prompt",
                code="context_length_exceeded",
            )
        room = self._max_length
        if room is not None and len(prompt) + asked.max_tokens > room:
            raise RequestError(
                400,
                f"max_tokens: expected at most {max(0, room - len(prompt))} (this model attends to "
                f"{room} tokens, and the prompt has {len(prompt)}), got {asked.max_tokens}",
                field="max_tokens",
                code="context_length_exceeded",
            )
        ends = () if asked.ignore_end else self._texts.text.end_tokens
        return Job(
            prompt=prompt,
            max_tokens=asked.max_tokens,
            sampling=replace(asked.sampling, vocab_limit=self._texts.text.vocab_limit),
            seed=(asked.seed + index) % 2**32,
            stop_tokens=(*asked.stop_tokens, *ends),
            logprobs=asked.logprobs,
            score_prompt=asked.echo and asked.logprobs is not None,
            seconds=self._limits.seconds,
        )

    async def _tokenizer(self, request: HTTPRequest) -> Response:
        text = self._texts.text
        ends, opening = text.end_tokens, text.encode("")
        return _json(
            {
                "eos_token": text.spelled(ends[0]) if ends else None,
                "bos_token": text.spelled(opening[0]) if opening else None,
                "vocab_size": text.vocab_size,
            }
        )

    async def _tokenize(self, request: HTTPRequest) -> Response:
        readers = {
            "prompt": string,
            "add_special_tokens": flag,
            "model": one_of(self._name),
        }
        found = read_fields(await self._body(request), readers)
        text = found.get("prompt")
        if text is None:
            raise unfit("prompt", "a string", None)
        opens = found.get("add_special_tokens", True)
        encode = self._texts.text.encode if opens else self._texts.text.continuation
        tokens = await asyncio.to_thread(encode, text, special=True)
        return _json({"count": len(tokens), "tokens": tokens})

    async def _detokenize(self, request: HTTPRequest) -> Response:
        readers = {"tokens": self._protocol.token_ids, "model": one_of(self._name)}
        found = read_fields(await self._body(request), readers)
        text, _ = self._texts.steps(found.get("tokens", []))
        return _json({"prompt": text})

    async def _body(self, request: HTTPRequest) -> Any:
        """The JSON of a request.

        Raises:
          RequestError: of another type, too large, too slow, or no JSON.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != _JSON:  # what a page of another site can send without being asked is no JSON
            raise RequestError(415, f"Content-Type: expected {_JSON}, got {kind[:80] or 'none'}")
        most, body = self._limits.body_bytes, bytearray()
        too_large = RequestError(413, f"body: expected at most {most} bytes, got more")
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length[:20]) > most:
            raise too_large
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for piece in request.stream():
                    body += piece
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            message = f"body: expected all of it within {_BODY_SECONDS:g} s, got a part"
            raise RequestError(408, message) from None
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestError(400, f"body: expected JSON (UTF-8), got: {error}") from None


_JSON = "application/json"


class _EventStream(Response):
    """Pieces as they come; the first is there already."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, pieces: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._pieces = first, pieces

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._pieces) as pieces:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            piece: bytes | None = self._first
            try:
                while piece is not None:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                    piece = await anext(pieces, None)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            except (ClientGoneError, OSError):
                return


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encoded(body), status, headers, media_type=_JSON)


async def _http_error(request: HTTPRequest, error: HTTPException) -> Response:
    """Paths and methods that there are not."""
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    body = RequestError(error.status_code, message).body()
    return _json(body, error.status_code, dict(error.headers or {}))


async def _own_error(request: HTTPRequest, error: Exception) -> Response:
    return _json(RequestError(500, "internal error", code="internal_error").body(), 500)
