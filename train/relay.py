"""JAX's connections to its coordination service, by way of the port that the processes met at.

A client of the service that loses its connection aborts its process. Its end of a relay stays open
when the other one closes, so that the run's own words (`train.lifeline`) are the last.
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
            _in_both_directions(near, far, keep_near=lambda: not leaving())

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
        except OSError:
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
    for one in (near, far):
        one.settimeout(None)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                target.sendall(data)
        if source is far and keep_near():
            return
        for one in (near, far):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    for pair in ((near, far), (far, near)):
        threading.Thread(target=pump, args=pair, daemon=True).start()
