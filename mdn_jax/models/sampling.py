"""Choosing the next token from its logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mdn_jax.models.arguments import is_real, is_whole
from mdn_jax.models.fields import require


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
        for name in ("vocab_limit", "top_k"):
            value = getattr(self, name)
            require(name, value, "an int >= 1 or None", value is None or is_whole(value, 1))
        temperature, top_p, penalty = self.temperature, self.top_p, self.repetition_penalty
        require("temperature", temperature, "a number >= 0", is_real(temperature))
        fits = is_real(top_p) and 0 < top_p <= 1
        require("top_p", top_p, "a number above 0 and at most 1", fits)
        fits = is_real(penalty) and penalty > 0
        require("repetition_penalty", penalty, "a number > 0", fits)


def _within(value: float, dtype: jnp.dtype) -> float:
    """The closest to a positive number with a normal value and reciprocal in the dtype."""
    smallest = float(jnp.finfo(dtype).tiny)
    return float(np.clip(value, smallest, 1 / smallest))


def filtered_logits(
    logits: Float[Array, "B vocab"], seen: Bool[Array, "B vocab"], sampling: Sampling
) -> Float[Array, "B vocab"]:
    """The logits to draw from; -inf for tokens that are out. Ties go to the lower token id.

    Args:
      logits: of the next token.
      seen: tokens that each row has had.
      sampling: what to apply; with temperature 0 only one token stays.
    """
    vocab, largest = logits.shape[-1], jnp.finfo(logits.dtype).max
    inside = jnp.arange(vocab) < min(sampling.vocab_limit or vocab, vocab)
    if sampling.repetition_penalty != 1.0:
        penalty = _within(sampling.repetition_penalty, logits.dtype)
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, jnp.clip(penalised, -largest, largest), logits)
    logits = jnp.where(inside, logits, -jnp.inf)
    if sampling.temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
    # of the likeliest there is 0 at any temperature, and the others fall to -inf where it is small
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = logits / _within(sampling.temperature, logits.dtype)
    if sampling.top_k is None and sampling.top_p == 1.0:
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    kept = jnp.ones(logits.shape, bool)  # by rank
    if sampling.top_k is not None:
        kept &= jnp.arange(vocab) < min(sampling.top_k, vocab)
    if sampling.top_p < 1.0:
        ranked = jnp.where(kept, jnp.take_along_axis(logits, order, axis=-1), -jnp.inf)
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept &= before < _within(sampling.top_p, logits.dtype)
    ranks = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(kept, ranks, axis=-1), logits, -jnp.inf)


def draw(
    logits: Float[Array, "B vocab"],
    seen: Bool[Array, "B vocab"],
    seeds: Int[Array, " B"],
    position: Int[Array, " B"],
    sampling: Sampling,
) -> Int[Array, " B"]:
    """One token a row, a function of the row's own logits, tokens, seed and position only.

    Where the largest logit is not finite (there is nan among them, or inf), nothing can be drawn:
    the token is -1.
    """
    drawable = jnp.isfinite(jnp.max(logits, axis=-1))
    logits = filtered_logits(logits, seen, sampling)
    if sampling.temperature == 0:
        return jnp.where(drawable, jnp.argmax(logits, axis=-1), -1).astype(jnp.int32)

    def one(logits: Array, seed: Array, position: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), logits)

    tokens = jax.vmap(one)(logits, seeds, position)
    return jnp.where(drawable, tokens, -1).astype(jnp.int32)
