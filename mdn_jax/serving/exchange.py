"""One request and its texts: from the engine's events to what is sent."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from functools import partial

from starlette.types import Receive

from mdn_jax.serving.engine import Engine
from mdn_jax.serving.errors import RequestError
from mdn_jax.serving.jobs import Event
from mdn_jax.serving.protocol import Request
from mdn_jax.serving.responses import DONE, Choice, Envelope, Format, encoded, sse, usage_of


class ClientGoneError(Exception):
    """Nobody reads any more."""


class Exchange:
    """The texts of one request.

    Used as a context: texts that have not ended when it is left are cancelled, and their slots are
    free at the next block.

    Args:
      engine: that makes them; it has not got them yet.
      request: what is asked for.
      prompts: token ids, as the request has them.
      choices: the answers, in the order of the response.
      kind: how they look.
      envelope: of the response.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        prompts: Sequence[Sequence[int]],
        choices: Sequence[Choice],
        kind: Format,
        envelope: Envelope,
    ) -> None:
        self._engine, self._request, self._prompts = engine, request, prompts
        self._choices, self._format, self._envelope = choices, kind, envelope
        self._events: asyncio.Queue[tuple[Choice, Event] | None] = asyncio.Queue()
        self._watcher: asyncio.Task[None] | None = None
        for choice in choices:
            choice.job.receive = partial(self._receive, choice)

    async def answer(self, receive: Receive) -> bytes:
        """The whole response.

        Raises:
          RequestError: a text failed.
          ClientGoneError: nobody waits for it any more.
        """
        texts = [""] * len(self._choices)
        try:
            self._watch(receive)
            async for choice, piece in self._pieces():
                texts[choice.index] += piece
        finally:
            self._close()
        choices = [
            self._format.whole(choice, text)
            for choice, text in zip(self._choices, texts, strict=True)
        ]
        return encoded(self._envelope.response(choices, self._usage()))

    async def stream(self, receive: Receive) -> AsyncGenerator[bytes, None]:
        """The pieces of a stream, with an error as its last if a text failed after the first.

        Raises:
          RequestError: a text failed before anything was made.
          ClientGoneError: nobody waits any more.
        """
        told: set[int] = set()
        request = self._request
        try:
            self._watch(receive)
            async for choice, piece in self._pieces():
                first = choice.index not in told
                if not (piece or first or choice.ended or choice.answer.steps):
                    continue  # a part of a character, or of a stop string
                told.add(choice.index)
                usage = self._usage() if request.usage_always else None
                body = self._format.chunk(choice, piece, first=first)
                yield self._envelope.event([body], usage)
            if request.usage:
                yield self._envelope.event([], self._usage())
            yield DONE
        except RequestError as error:
            if not told:
                raise
            yield sse(error.body())
        finally:
            self._close()

    async def _pieces(self) -> AsyncGenerator[tuple[Choice, str], None]:
        """Every choice that has something new, until all have ended."""
        going = len(self._choices)
        while going:
            item = await self._events.get()
            if item is None:
                raise ClientGoneError
            choice, event = item
            if choice.ended:  # behind a stop string
                continue
            piece = choice.take(event)
            if choice.finish is not None:
                going -= 1
                if event.end is None:
                    self._engine.cancel(choice.job)
            yield choice, piece

    def _usage(self) -> dict[str, object]:
        usage: dict[str, object] = usage_of(self._request, self._prompts, self._choices)
        return usage

    def _receive(self, choice: Choice, event: Event) -> None:
        self._events.put_nowait((choice, event))

    def _watch(self, receive: Receive) -> None:
        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._events.put_nowait(None)

        self._watcher = asyncio.create_task(watch())

    def _close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        for choice in self._choices:
            if not choice.job.ended:
                self._engine.cancel(choice.job)
