"""What a server counts, for Prometheus."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mdn_jax.serving.jobs import Job

PARTS = ("begin", "wait", "tell", "launch", "read", "admit")
"""Of a turn of the engine: texts that are gone and the call of the next block; waiting for the
tokens of the one before; telling them; waiting until the next block's program has been launched;
reading prompts; and what they become."""

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters with a registry of their own, so that several servers of a process do not mix."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.slots = Gauge("mdn_slots", "Texts that can be decoded at once", registry=own)
        self.active = Gauge("mdn_slots_active", "Texts that have a slot", registry=own)
        self.waiting = Gauge("mdn_queue_length", "Texts that wait for a slot", registry=own)
        self.state = Gauge("mdn_state_bytes", "Bytes of the state of one text", registry=own)
        self.prefix_bytes = Gauge("mdn_prefix_cache_bytes", "Bytes of kept states", registry=own)
        self.prefixes = Gauge("mdn_prefix_cache_states", "States that are kept", registry=own)
        self.requests = Counter(
            "mdn_requests", "Requests, by path and status", ["path", "status"], registry=own
        )
        self.prompt_tokens = Counter("mdn_prompt_tokens", "Tokens of prompts", registry=own)
        self.cached_tokens = Counter(
            "mdn_prompt_tokens_cached", "Tokens of prompts whose state was kept", registry=own
        )
        self.tokens = Counter("mdn_generated_tokens", "Tokens made", registry=own)
        self.ended = Counter("mdn_texts", "Texts, by what ended them", ["end"], registry=own)
        self.first_token = Histogram(
            "mdn_first_token_seconds", "From request to first token", registry=own, buckets=_SECONDS
        )
        self.whole = Histogram(
            "mdn_text_seconds", "From request to last token", registry=own, buckets=_SECONDS
        )

        self.turns = Counter("mdn_engine_turns", "Turns of the engine", registry=own)
        self.engine_seconds = Counter(
            "mdn_engine_seconds", "Time of the engine's thread, by part", ["part"], registry=own
        )
        for part in PARTS:
            self.engine_seconds.labels(part)

    def turn(self) -> Callable[[str], None]:
        """Begins a turn of the engine; what it returns gives the time since then to a part."""
        self.turns.inc()
        last = time.perf_counter()

        def passed(part: str) -> None:
            nonlocal last
            now = time.perf_counter()
            self.engine_seconds.labels(part).inc(now - last)
            last = now

        return passed

    def engine_time(self) -> dict[str, float]:
        """Turns of the engine, and seconds of each part, so far."""
        value = self.registry.get_sample_value
        seconds = {part: value("mdn_engine_seconds_total", {"part": part}) or 0.0 for part in PARTS}
        return {"turns": value("mdn_engine_turns_total") or 0.0} | seconds

    def text(self) -> bytes:
        """All of them in Prometheus' format."""
        return generate_latest(self.registry)

    def count_end(self, job: Job, end: str, now: float) -> None:
        """Counts a text that has ended."""
        self.ended.labels(end).inc()
        self.prompt_tokens.inc(len(job.prompt))
        self.cached_tokens.inc(job.cached)
        self.tokens.inc(job.made)
        self.whole.observe(now - job.began)
        if job.first is not None:
            self.first_token.observe(job.first - job.began)
