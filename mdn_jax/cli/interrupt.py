"""Ctrl-C and termination: a request that the loop answers between two steps, never a stack."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """While entered, notes the first SIGINT or SIGTERM; a second one acts as it always does.

    Attributes:
      signal: number of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        for before in self._before.values():
            if isinstance(before, CommandSignals):
                before.said = True

    def _restore(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)


def reader_left() -> int:
    """Drops what is still to be printed, as the pipe has no reader; returns the exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


class CommandSignals:
    """What signals do to a command: the first unwinds it, any more end the process at once.

    At once is by one line and status 128 + n, with the files as they are: a checkpoint half written
    does not count, as after a kill.

    Attributes:
      said: whether it has been told to end, or is ending by itself.
    """

    def __init__(self, program: str) -> None:
        """Answers the signals from now on.

        Args:
          program: name in messages.
        """
        self.said = False
        self._program = program
        for number in _SIGNALS:
            signal.signal(number, self)
        sys.unraisablehook = UnraisableInterrupts(self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal."""
        if self.said:
            self.end_now(number)
        self.said = True
        raise KeyboardInterrupt(number)

    def end_now(self, number: int) -> NoReturn:
        """Ends the process, with nothing of Python's own."""
        # not by way of sys.stderr, which may be in the middle of a write
        os.write(2, f"\n{self._program}: interrupted\n".encode())
        os._exit(128 + number)


class UnraisableInterrupts:
    """Hook for errors that Python can only show: one of a signal ends the process without it."""

    def __init__(self, signals: CommandSignals) -> None:
        self._signals = signals

    def __call__(self, unraisable: Any) -> None:
        """Takes what `sys.unraisablehook` is given."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            self._signals.end_now(status_of(unraisable.exc_value) - 128)
        sys.__unraisablehook__(unraisable)


def status_of(interrupt: KeyboardInterrupt) -> int:
    """The exit status after it: 128 + the signal's number."""
    number: int = interrupt.args[0] if interrupt.args else signal.SIGINT
    return 128 + number
