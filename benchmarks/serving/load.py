"""Load by the `openai` package: streams that come, go and are cancelled at random.

Run as a process: a job as JSON on standard input, a report as JSON on standard output. Every text
that is not cancelled has to equal the one that the same request got when it was alone.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from typing import Any

import openai


async def whole(client: openai.AsyncOpenAI, request: dict[str, Any]) -> str:
    """The text of a request by itself."""
    answer = await client.completions.create(**request)
    return answer.choices[0].text


async def streamed(client: openai.AsyncOpenAI, request: dict[str, Any], leave: int | None) -> str:
    """The text of a stream, which is left after some pieces."""
    text = ""
    async with await client.completions.create(stream=True, **request) as stream:
        async for piece in stream:
            text += piece.choices[0].text
            if leave is not None:
                leave -= 1
                if leave < 0:
                    break
    return text


def requests_of(
    model: str, count: int, prompt: int, tokens: int, seed: int
) -> list[dict[str, Any]]:
    """Requests of random lengths, some greedy and some drawn."""
    rng = random.Random(seed)
    return [
        {
            "model": model,
            "prompt": [rng.randrange(256) for _ in range(rng.randint(1, prompt))],
            "max_tokens": rng.randint(1, tokens),
            "temperature": rng.choice([0.0, 0.7, 1.0]),
            "seed": rng.randrange(1 << 32),
            "extra_body": {"top_k": rng.choice([-1, 40])},
        }
        for _ in range(count)
    ]


async def load(job: dict[str, Any]) -> dict[str, Any]:
    """Runs the load; a report."""
    base = f"http://127.0.0.1:{job['port']}/v1"
    pool = requests_of(job["model"], job["requests"], job["prompt"], job["tokens"], job["seed"])
    seen: Counter[str] = Counter()
    different: list[int] = []
    async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0, timeout=600) as one:
        alone = [await whole(one, request) for request in pool]
        late = time.monotonic() + job["seconds"]

        async def worker(number: int) -> None:
            rng = random.Random(job["seed"] + 1 + number)
            while time.monotonic() < late:
                await asyncio.sleep(rng.expovariate(1 / job["pause"]))
                which = rng.randrange(len(pool))
                kind = rng.choice(["whole", "streamed", "streamed", "left"])
                if kind == "whole":
                    text = await whole(one, pool[which])
                else:
                    leave = rng.randint(0, 4) if kind == "left" else None
                    text = await streamed(one, pool[which], leave)
                seen[kind] += 1
                same = text == alone[which] or (kind == "left" and alone[which].startswith(text))
                if not same:
                    different.append(which)

        await asyncio.gather(*map(worker, range(job["streams"])))
    return {"texts": sum(seen.values()), **seen, "different": different}


if __name__ == "__main__":
    json.dump(asyncio.run(load(json.load(sys.stdin))), sys.stdout)
