"""What one server takes on."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a server; a request beyond one is answered with the status that says so."""

    slots: int = 16
    """Texts that are decoded at once; the others wait."""

    queue: int = 256
    """Texts that may wait for a slot; more: status 429."""

    prompt_tokens: int = 32768
    """Most tokens of a prompt."""

    max_tokens: int = 4096
    """Most tokens of an answer."""

    choices: int = 64
    """Most texts of one request: prompts times `n`."""

    body_bytes: int = 4 * 2**20
    """Most bytes of a request's body; more: status 413."""

    seconds: float = 600.0
    """Most seconds of a request, waiting included; then it ends: status 504, or an error in the
    stream."""

    drain_seconds: float = 30.0
    """Seconds that running requests may take to end after SIGTERM."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, int):
                least = 0 if field.name == "queue" else 1
                expected, fits = f"an int >= {least}", value >= least
            else:
                expected, fits = "seconds >= 0", 0 <= value < float("inf")
            if not fits:
                raise ValueError(f"{field.name}: expected {expected}, got {value!r}")
