"""One text to make: what is asked of the engine, and what it tells as it goes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from mdn_jax.models import Sampling

End = Literal["stop", "length", "timeout", "cancelled", "error"]
"""Why a text ended: a stop token, its limit, the time, its reader, or the model."""

MOST_STOP_TOKENS = 64
"""Of one request, beside those of the tokenizer."""


class Scores(NamedTuple):
    """Log-probabilities (nats) of some tokens, of the model's own distribution.

    Attributes:
      drawn: of each token; None: nothing predicted it.
      likeliest: for each token the likeliest ones there with theirs, the likeliest first.
    """

    drawn: list[float | None]
    likeliest: list[list[tuple[int, float]]]


class Event(NamedTuple):
    """What is new of a text.

    Attributes:
      tokens: since the event before; a stop token is the last of them.
      scores: of these tokens; None where not asked for.
      prompt: scores of the prompt, once, where asked for.
      end: why it ended, in its last event; None: it goes on.
      message: of an error.
    """

    tokens: Sequence[int] = ()
    scores: Scores | None = None
    prompt: Scores | None = None
    end: End | None = None
    message: str = ""


@dataclass(eq=False, kw_only=True)
class Job:
    """A text to make.

    Attributes:
      prompt: its token ids, at least one.
      max_tokens: most tokens to make; 0: only the prompt is scored.
      sampling: how they are drawn.
      seed: a token depends on this and its position.
      stop_tokens: tokens that end it.
      logprobs: likeliest tokens to tell at each step, 0 included; None: no log-probabilities.
      score_prompt: whether the prompt's tokens have scores too; then all of it is read.
      seconds: that it may take, from now.
      receive: is called with its events, in order.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    logprobs: int | None = None
    score_prompt: bool = False
    seconds: float = float("inf")
    receive: Callable[[Event], None] = lambda event: None

    began: float = field(default_factory=time.monotonic, init=False)
    first: float | None = field(default=None, init=False)
    made: int = field(default=0, init=False)
    cached: int = field(default=0, init=False)
    ended: bool = field(default=False, init=False)
    cancelled: bool = field(default=False, init=False)
    scored: list[Any] = field(default_factory=list, init=False)

    @property
    def late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() - self.began > self.seconds
