"""Choosing the next token from its logits."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; the filters apply in the order of the fields."""

    vocab_limit: int | None = None
    """Only token ids below this; None: the whole vocabulary."""

    repetition_penalty: float = 1.0
    """Logits of tokens that the row has had: divided by this where positive, else multiplied."""

    temperature: float = 1.0
    """The logits are divided by this; 0: always the likeliest token."""

    top_k: int | None = None
    """Only the `top_k` likeliest tokens; None: all."""

    top_p: float = 1.0
    """Only the fewest likeliest tokens that together have this probability."""

    def __post_init__(self) -> None:
        temperature, penalty = self.temperature, self.repetition_penalty
        for name in ("vocab_limit", "top_k"):
            value = getattr(self, name)
            _check(name, value, "an int >= 1 or None", value is None or value >= 1)
        _check("temperature", temperature, "a number >= 0", 0 <= temperature < math.inf)
        _check("top_p", self.top_p, "a number above 0 and at most 1", 0 < self.top_p <= 1)
        _check("repetition_penalty", penalty, "a number > 0", 0 < penalty < math.inf)


def _check(name: str, value: object, expected: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def filtered_logits(
    logits: Float[Array, "B vocab"], seen: Bool[Array, "B vocab"], sampling: Sampling
) -> Float[Array, "B vocab"]:
    """The logits to draw from; -inf for tokens that are out. Ties go to the lower token id.

    Args:
      logits: of the next token.
      seen: tokens that each row has had.
      sampling: what to apply; with temperature 0 only one token stays.
    """
    if sampling.vocab_limit is not None:
        inside = jnp.arange(logits.shape[-1]) < sampling.vocab_limit
        logits = jnp.where(inside, logits, -jnp.inf)
    if sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, penalised, logits)
    if sampling.temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
    logits = logits / sampling.temperature
    if sampling.top_k is None and sampling.top_p == 1.0:
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    kept = jnp.ones(logits.shape, bool)  # by rank
    if sampling.top_k is not None:
        kept &= jnp.arange(logits.shape[-1]) < sampling.top_k
    if sampling.top_p < 1.0:
        ranked = jnp.where(kept, jnp.take_along_axis(logits, order, axis=-1), -jnp.inf)
        probabilities = jax.nn.softmax(ranked, axis=-1)
        kept &= jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p
    ranks = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(kept, ranks, axis=-1), logits, -jnp.inf)


def draw(
    logits: Float[Array, "B vocab"],
    seen: Bool[Array, "B vocab"],
    seeds: Int[Array, " B"],
    position: Int[Array, " B"],
    sampling: Sampling,
) -> Int[Array, " B"]:
    """One token a row, a function of the row's own logits, tokens, seed and position only."""
    logits = filtered_logits(logits, seen, sampling)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def one(logits: Array, seed: Array, position: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), logits)

    return jax.vmap(one)(logits, seeds, position).astype(jnp.int32)
