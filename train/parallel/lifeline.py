"""A connection between the processes of a run, by which they compare values and end together.

It is open from their meeting (`train.parallel.meeting`) to the end of the run. A process that fails
says why; one that is killed closes its connection without a word: the kernel does so at once, and
after half a minute of silence for a host that is gone. Nothing is polled, nothing happens
in a step.
"""

import contextlib
import json
import os
import socket
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn

from mdn_jax.errors import RunError
from train import PROGRAM

_SETTLE = 1.0  # seconds in which another process's failure would explain one's own
_PATIENCE = 5.0  # seconds in which the main thread may end by itself after another's failure
_UNWIND = 15.0  # seconds to end in once another process has gone
_SILENCE = 30  # seconds after which the kernel gives up a host that does not answer

Frame = dict[str, Any]


class Connection:
    """A socket that carries JSON values, one a line."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(None)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = {"TCP_NODELAY": 1, "TCP_KEEPIDLE": _SILENCE // 3, "TCP_KEEPINTVL": _SILENCE // 6}
        options |= {"TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 1000 * _SILENCE}
        for name, value in options.items():
            if hasattr(socket, name):  # not all of them on every system
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._socket, self._file = connected, connected.makefile("rb")
        self._sending = threading.Lock()

    def send(self, frame: Frame) -> None:
        """Sends; that nobody is there any more is noticed by who receives."""
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(frame).encode() + b"\n")

    def receive(self) -> Frame | None:
        """The next frame, or None at the end of the connection or of what can be understood."""
        try:
            frame = json.loads(self._file.readline())
            if isinstance(frame, dict):
                return frame
        except (OSError, ValueError):
            pass
        self._file.close()
        self._socket.close()
        return None

    def close(self) -> None:
        """Ends the connection for both sides, whoever is waiting on it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


class Lifeline(ABC):
    """One process's end.

    Attributes:
      index: of the process.
      count: of processes.
      failure: what ended another process, with its number; None: nothing that is known of.
      leaving: whether the run is over, so that a connection that closes means nothing.
    """

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count
        self.failure: str | None = None
        self.leaving = False
        self._own: str | None = None  # what ends this process
        self._changed = threading.Condition()
        self._rounds = 0
        self._gathered: dict[int, list[Any]] = {}

    def gather(self, value: Any) -> list[Any]:
        """What each process brings to the same call, JSON values, by the process's number.

        Raises:
          RunError: another process failed.
        """
        with self._changed:
            number = self._rounds
            self._rounds += 1
        self._bring(number, json.loads(json.dumps(value, default=int)))
        while True:  # in short waits, between which Python answers signals
            with self._changed:
                if number in self._gathered:
                    return self._gathered.pop(number)
                if self.failure is not None:
                    raise RunError(self.failure)
                self._changed.wait(0.5)

    def settle(self, error: BaseException, message: str) -> str:
        """What the run ends with, told to the other processes if it began with this one.

        Args:
          error: what was raised here; it may be what a process feels when another has gone.
          message: of it.
        """
        own = isinstance(error, KeyboardInterrupt)
        with self._changed:
            if self._own is not None:  # on its way already
                return self._own
            if self.failure is None and not own:
                self._changed.wait_for(lambda: self.failure is not None, _SETTLE)
            if self.failure is None:
                self._own = message
            else:
                same = self.failure.endswith(f": {message}")
                self._own = message if same or own else self.failure
        self._tell_failure(message)
        return self._own

    @abstractmethod
    def _bring(self, number: int, value: Any) -> None:
        """Sends a value of `gather` on its way."""

    @abstractmethod
    def _tell_failure(self, message: str) -> None:
        """Tells the others what ended this process."""

    def _deliver(self, number: int, values: list[Any]) -> None:
        with self._changed:
            self._gathered[number] = values
            self._changed.notify_all()

    def _other_failed(self, failure: str) -> None:
        """Ends this process soon, if its main thread does not (it may wait for a device)."""
        with self._changed:
            if self.leaving or self.failure is not None:
                return
            self.failure = failure
            self._changed.notify_all()
        _later(_PATIENCE, self._end_unless_noticed)

    def _other_gone(self) -> None:
        """Gives what this process still does a limit: it may wait for the one that has gone."""
        if not self.leaving:
            _later(_UNWIND, self._end)

    def _end_unless_noticed(self) -> None:
        if self._own is None:
            self._end()

    def _end(self) -> None:
        if not self.leaving:
            end = "\n" if sys.stderr.isatty() else ""  # below the progress bar
            print(f"{end}{PROGRAM}: error: {self._own or self.failure}", file=sys.stderr)
            leave_now(1)


def leave_now(status: int) -> NoReturn:
    """Ends the process as it is: JAX's way out waits for processes that may be gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def in_background(function: Callable[..., object], *arguments: Any) -> None:
    """Calls a function in a thread that does not keep the process."""
    threading.Thread(target=function, args=arguments, daemon=True).start()


def _later(seconds: float, function: Callable[[], object]) -> None:
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()
