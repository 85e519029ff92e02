"""Streams of completions over HTTP by nothing but the standard library: a client that costs little.

Run as a process, so that it does not share Python's lock with the server: a job as JSON on standard
input, what came and when as JSON on standard output.
"""

import asyncio
import json
import sys
import time
from typing import Any


async def stream(port: int, body: dict[str, Any]) -> dict[str, Any]:
    """One completion: its text, and the seconds and numbers of tokens of its pieces."""
    data = json.dumps(body | {"stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    began = time.perf_counter()
    writer.write(head.encode() + data)
    text, times, counts = [], [], []
    try:
        status = (await reader.readline()).split()[1]
        async for line in reader:
            if line.startswith(b"data: {"):
                piece = json.loads(line[6:])
                if "error" in piece:
                    raise RuntimeError(piece["error"]["message"])
                text += [choice["text"] for choice in piece["choices"]]
                times.append(time.perf_counter())
                counts.append(piece["usage"]["completion_tokens"])
        if status != b"200":
            raise RuntimeError(f"status {status.decode()}")
    finally:
        writer.close()
    return {"began": began, "times": times, "counts": counts, "text": "".join(text)}


async def run(port: int, lanes: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Every lane's completions one after another, all lanes at once."""

    async def lane(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [await stream(port, body) for body in bodies]

    return await asyncio.gather(*map(lane, lanes))


if __name__ == "__main__":
    job = json.load(sys.stdin)
    json.dump(asyncio.run(run(job["port"], job["lanes"])), sys.stdout)
