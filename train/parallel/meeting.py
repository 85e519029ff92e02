"""How the processes of a run find each other: at the coordinator's port of process 0, the hub.

JAX's own coordination service cannot tell who is missing: a client that finds nobody aborts with a
C++ stack. So it is started after the meeting, when all are there, on a port of process 0's host
alone that the others reach through the hub (`train.parallel.relay`).
"""

import contextlib
import json
import socket
import sys
import time
from typing import Any

from mdn_jax.errors import RunError
from train import PROGRAM
from train.parallel.lifeline import Connection, Frame, Lifeline, in_background
from train.parallel.relay import free_port, serve_tunnel

WAIT = 300.0  # seconds for all processes to come
_SAY_EVERY = 5.0  # seconds, while waiting
_HELLO_SECONDS, _HELLO_BYTES = 20.0, 4096


class Hub(Lifeline):
    """Process 0's end, which all the others are connected to.

    Attributes:
      service: port for JAX's coordination service, on this host alone.
    """

    def __init__(self, port: int, count: int, *, wait: float = WAIT) -> None:
        """Listens and waits for the other processes.

        Args:
          port: to listen on.
          count: of processes, this one included.
          wait: seconds to wait for them.

        Raises:
          RunError: a port that cannot be had, or processes that do not come or do not fit.
        """
        super().__init__(0, count)
        self.service = free_port()
        self._port = port
        self._waiting = Waiting(wait)
        self._members: dict[int, Connection] = {}
        self._hosts = {0: socket.gethostname()}
        self._met = False
        self._brought: dict[int, dict[int, Any]] = {}
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        try:
            self._listener = socket.create_server(("", port), family=family, dualstack_ipv6=dual)
        except OSError as error:
            raise RunError(
                "distributed.coordinator: expected a port that process 0 can listen on, got "
                f"{port}: {error.strerror}"
            ) from None
        in_background(self._accept)
        try:
            self._meet()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets nobody in any more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits in it
        self._listener.close()

    def _meet(self) -> None:
        with self._changed:
            while self.failure is None and (missing := self._missing()):
                if self._waiting.over:
                    self.failure = (
                        f"distributed: expected {self.count} processes at port {self._port} of "
                        f"process 0 within {self._waiting.seconds:g} s, got "
                        f"{len(self._members) + 1}; missing: {missing}"
                    )
                self._changed.wait(0.2)
                self._waiting.say(f"for process {missing} of {self.count} at port {self._port}")
            self._met = self.failure is None
        if self.failure is not None:
            self._to_all({"refused": self.failure})
            raise RunError(self.failure)
        self._to_all({"met": True})

    def _missing(self) -> str:
        return ", ".join(str(i) for i in range(1, self.count) if i not in self._members)

    def _accept(self) -> None:
        while True:
            try:
                connected, (host, *_) = self._listener.accept()
            except OSError:  # closed
                return
            in_background(self._welcome, connected, host)

    def _welcome(self, connected: socket.socket, host: str) -> None:
        connected.settimeout(_HELLO_SECONDS)
        hello = _read_hello(connected)
        if "tunnel" in hello:
            serve_tunnel(connected, self.service)
        elif not isinstance(hello.get("index"), int):  # not one of ours
            connected.close()
        else:
            connection, index = Connection(connected), hello["index"]
            who = f"{hello.get('host')} ({host.removeprefix('::ffff:')})"
            refusal = self._admit(index, hello.get("count"), connection, who)
            if refusal is not None:
                connection.send({"refused": refusal})
                connection.close()
                connection.receive()
                return
            connection.send({"welcome": True})
            self._listen_to(index, connection)

    def _admit(self, index: int, count: object, connection: Connection, who: str) -> str | None:
        """Takes a process in, or says why not, which ends a meeting that still goes on."""
        with self._changed:
            refusal = None
            if count != self.count:
                refusal = (
                    f"distributed.processes: expected {self.count}, as process 0 has it, got "
                    f"{count} from process {index} on {who}"
                )
            elif index in self._hosts or not 0 < index < self.count:
                refusal = (
                    f"distributed.index: expected each index from 0 to {self.count - 1} once, got "
                    f"{index} from {who}, and from {self._hosts.get(index, 'no other')}"
                )
            if refusal is None:
                self._members[index], self._hosts[index] = connection, who
            elif not self._met:
                self.failure = refusal
            self._changed.notify_all()
            return refusal

    def _listen_to(self, index: int, connection: Connection) -> None:
        told = False
        while (frame := connection.receive()) is not None:
            if "value" in frame:
                self._collect(index, frame["round"], frame["value"])
            elif "failed" in frame:
                told = True
                self._pass_on(index, f"process {index}: {frame['failed']}")
        with self._changed:
            where = self._hosts[index]
            if not self._met:  # it may be started again
                del self._members[index], self._hosts[index]
                return
        if not self.leaving:
            if not told:
                self._pass_on(index, _killed(index, where))
            self._to_all({"gone": index}, but=index)
            self._other_gone()

    def _pass_on(self, index: int, failure: str) -> None:
        self._to_all({"failed": failure}, but=index)
        self._other_failed(failure)

    def _collect(self, index: int, number: int, value: Any) -> None:
        with self._changed:
            brought = self._brought.setdefault(number, {})
            brought[index] = value
            if len(brought) < self.count:
                return
            del self._brought[number]
        values = [brought[i] for i in range(self.count)]
        self._to_all({"round": number, "values": values})
        self._deliver(number, values)

    def _to_all(self, frame: Frame, *, but: int | None = None) -> None:
        with self._changed:
            members = [x for index, x in self._members.items() if index != but]
        for connection in members:
            connection.send(frame)

    def _bring(self, number: int, value: Any) -> None:
        self._collect(0, number, value)

    def _tell_failure(self, message: str) -> None:
        self._to_all({"failed": f"process 0: {message}"})


class Spoke(Lifeline):
    """The end of a process with another number than 0."""

    def __init__(self, host: str, port: int, index: int, count: int, *, wait: float = WAIT) -> None:
        """Finds process 0 and waits with it for the others.

        Args:
          host: of process 0.
          port: that it listens on.
          index: of this process.
          count: of processes.
          wait: seconds to wait for process 0.

        Raises:
          RunError: nobody at this address, someone else, or processes that do not fit.
        """
        super().__init__(index, count)
        self._where = f"{host}:{port}"
        self._answer: Frame | None = {}
        self._connection = Connection(self._reach(host, port, Waiting(wait)))
        self._connection.send({"index": index, "count": count, "host": socket.gethostname()})
        in_background(self._listen)
        self._meet()

    def _reach(self, host: str, port: int, waiting: "Waiting") -> socket.socket:
        while True:
            try:  # a name that is not known yet may be, when the host is up
                return socket.create_connection((host, port), min(_SAY_EVERY, waiting.left))
            except OSError as error:
                cause = error.strerror or str(error)
            if waiting.over:
                raise RunError(
                    f"distributed.coordinator: expected process 0 to answer at {self._where} "
                    f"within {waiting.seconds:g} s, got: {cause}"
                )
            waiting.say(f"for process 0 at {self._where} ({cause})")
            time.sleep(min(0.5, waiting.left))

    def _meet(self) -> None:
        hello, others = Waiting(_HELLO_SECONDS), Waiting(None)
        with self._changed:
            while self._answer is not None and not {"met", "refused"} & self._answer.keys():
                if hello.over and not self._answer:
                    break
                self._changed.wait(0.2)
                others.say(f"with process 0 at {self._where} for the others")
            answer = self._answer or {}
        if "met" in answer:
            return
        self._connection.close()
        raise RunError(
            answer.get("refused")
            or f"distributed.coordinator: expected process 0 of {PROGRAM} at {self._where}, got "
            "no answer or another program's"
        )

    def _listen(self) -> None:
        met = False
        while (frame := self._connection.receive()) is not None:
            if "values" in frame:
                self._deliver(frame["round"], frame["values"])
            elif "failed" in frame:
                self._other_failed(frame["failed"])
            elif "gone" in frame:
                self._other_gone()
            elif not met:
                met = "met" in frame
                self._hear(frame)
        if met:
            self._other_failed(_killed(0, self._where))
            self._other_gone()
        else:
            self._hear(None)

    def _hear(self, answer: Frame | None) -> None:
        with self._changed:
            if not self._answer or "refused" not in self._answer:
                self._answer = answer
            self._changed.notify_all()

    def _bring(self, number: int, value: Any) -> None:
        self._connection.send({"round": number, "value": value})

    def _tell_failure(self, message: str) -> None:
        self._connection.send({"failed": message})


class Waiting:
    """A wait that may have an end, and that says every few seconds what it is for.

    Attributes:
      seconds: until the end, from the beginning; None: there is none.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._began = self._said = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds until the end, above 0."""
        passed = time.monotonic() - self._began
        return max((self.seconds or 0.0) - passed, 0.01)

    @property
    def over(self) -> bool:
        """Whether the end has come."""
        return self.seconds is not None and time.monotonic() - self._began >= self.seconds

    def say(self, what: str) -> None:
        """Says what the wait is for, unless that was said a moment ago."""
        now = time.monotonic()
        if now - self._said < _SAY_EVERY:
            return
        self._said = now
        left = "" if self.seconds is None else f", {self.left:.0f} s left"
        line = f"{PROGRAM}: waiting {what}: {now - self._began:.0f} s passed{left}"
        print(line, file=sys.stderr, flush=True)


def _killed(index: int, where: str) -> str:
    return (
        f"process {index} on {where}: expected to run until the end, got a closed connection: it "
        "was killed (for memory, for example) or its host is gone; its own output may say more"
    )


def _read_hello(connected: socket.socket) -> Frame:
    """The first line, byte by byte (the rest may be for another); empty if it is not ours."""
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < _HELLO_BYTES:
            byte = connected.recv(1)
            if not byte:
                break
            line += byte
        hello = json.loads(line)
    except (OSError, ValueError):
        return {}
    return hello if isinstance(hello, dict) else {}
