"""What a server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mdn_jax.serving.jobs import Job

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
