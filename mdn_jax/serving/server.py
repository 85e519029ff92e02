"""The server's process: a socket, signals, and an end that loses nothing."""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import override

import uvicorn
from starlette.types import ASGIApp

from mdn_jax.serving.engine import Engine

log = logging.getLogger(__name__)

_SWITCH_SECONDS = 0.0005
"""Python's threads take turns this often: the engine's must not wait for the server's."""

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Server(uvicorn.Server):
    """Serves until a signal comes; then no new requests, and an end when those there are done.

    A second signal ends the process at once.

    Args:
      app: what is served.
      engine: whose texts are waited for.
      drain_seconds: how long at most.

    Attributes:
      signal: the one that came, or None.
    """

    def __init__(self, app: ASGIApp, engine: Engine, *, drain_seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                loop="asyncio",
                http="h11",
                ws="none",
                timeout_keep_alive=30,
                timeout_graceful_shutdown=5,
            )
        )
        self.signal: int | None = None
        self._engine, self._seconds = engine, drain_seconds
        self._draining: asyncio.Task[None] | None = None

    @override
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        try:
            for number in numbers:
                loop.add_signal_handler(number, self._on_signal, number)
        except (ValueError, RuntimeError):  # no main thread: whoever runs it ends it
            yield
            return
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    @override
    async def on_tick(self, counter: int) -> bool:
        """Whether it is to end: an engine that has failed makes no more texts."""
        return await super().on_tick(counter) or self._engine.status == "failed"

    def _on_signal(self, number: int) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        self.end_softly()

    def end_softly(self) -> None:
        """No new requests, and the end when those that are there are done."""
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        engine, loop = self._engine, asyncio.get_running_loop()
        engine.drain()
        log.info("no new requests; %d texts go on", engine.active + engine.waiting)
        late = loop.time() + self._seconds
        while engine.active + engine.waiting and loop.time() < late:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(engine.close)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything slow begins.

    Raises:
      OSError: the address is in use or not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise OSError(f"port: expected a free one on {host}, got {port}: {error}") from None


def run_server(server: Server, engine: Engine, sock: socket.socket) -> int:
    """Serves on a socket; returns the exit status: 0, 130 after Ctrl-C, 1 after a failure."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    engine.start()
    try:
        server.run([sock])
    finally:
        engine.close(timeout=30)
    if engine.status == "failed":
        print("the engine has failed", file=sys.stderr)
        return 1
    return 128 + signal.SIGINT if server.signal == signal.SIGINT else 0


@contextmanager
def in_background(app: ASGIApp, engine: Engine, host: str = "127.0.0.1") -> Iterator[int]:
    """Serves in a thread of this process, on a free port, until the context is left.

    Yields:
      The port, when the engine is ready.

    Raises:
      RuntimeError: the engine has failed.
    """
    with listen(host, 0) as sock:
        server = Server(app, engine, drain_seconds=0)
        thread = threading.Thread(target=server.run, args=([sock],), name="server")
        sys.setswitchinterval(_SWITCH_SECONDS)
        engine.start()
        thread.start()
        try:
            while not server.started or engine.status == "starting":
                time.sleep(0.01)
            if engine.status == "failed":
                raise RuntimeError("the engine has failed")
            yield sock.getsockname()[1]
        finally:
            engine.close()
            server.should_exit = True
            thread.join()


def is_private(host: str) -> bool:
    """Whether only this machine reaches it."""
    return host in _LOOPBACK
