"""JAX's connections to its coordination service, by way of the port that the processes met at.

A client of the service that loses its connection aborts its process. Its end of a relay stays open
when the other one closes, so that the run's own words (`train.parallel.lifeline`) are the last.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable

_LOCAL = "127.0.0.1"
_CHUNK = 1 << 16  # bytes
_STARTS_WITHIN = 60.0  # seconds, of the service after the meeting


def open_relay(host: str, port: int, *, leaving: Callable[[], bool]) -> int:
    """Serves a local port that leads to the coordination service at process 0.

    Args:
      host: of process 0.
      port: that its hub listens on.
      leaving: whether the run is over and connections may close.

    Returns:
      The local port.
    """
    listener = socket.create_server((_LOCAL, 0))

    def accept() -> None:
        while True:
            near, _ = listener.accept()
            try:
                far = socket.create_connection((host, port))
                far.sendall(json.dumps({"tunnel": True}).encode() + b"\n")
            except OSError:
                near.close()
                continue
            threading.Thread(
                target=_in_both_directions,
                args=(near, far),
                kwargs={"keep_near": lambda: not leaving()},
                daemon=True,
            ).start()

    threading.Thread(target=accept, daemon=True).start()
    return int(listener.getsockname()[1])


def serve_tunnel(far: socket.socket, service: int) -> None:
    """Connects what came through a relay to the coordination service on this host.

    Args:
      far: the connection of the other process, at the first byte for the service.
      service: its port.
    """
    end = time.monotonic() + _STARTS_WITHIN
    while True:
        try:
            near = socket.create_connection((_LOCAL, service))
            break
        except OSError:  # it starts after the meeting
            if time.monotonic() > end:
                far.close()
                return
            time.sleep(0.05)
    _in_both_directions(far, near, keep_near=lambda: False)


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.create_server((_LOCAL, 0)) as listener:
        return int(listener.getsockname()[1])


def _in_both_directions(
    near: socket.socket, far: socket.socket, *, keep_near: Callable[[], bool]
) -> None:
    """Passes on what comes until both ends are done.

    Args:
      near: the connection that began it.
      far: the one that was made for it.
      keep_near: whether to leave the near one open although the far one has closed.
    """
    for one in (near, far):
        one.settimeout(None)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def back() -> None:
        _pump(far, near, lambda: False)
        if not keep_near():
            _shut(near)

    returning = threading.Thread(target=back, daemon=True)
    returning.start()
    _pump(near, far, keep_near)
    _shut(far)
    returning.join()
    for one in (near, far):
        one.close()


def _pump(source: socket.socket, target: socket.socket, drop: Callable[[], bool]) -> None:
    """Until the source ends, or the target where what it cannot have is not to be dropped."""
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            try:
                target.sendall(data)
            except OSError:
                if not drop():
                    return


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
