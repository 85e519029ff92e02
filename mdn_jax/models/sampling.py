"""Choosing the next token from its logits: what users write, the same as arrays, the draw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mdn_jax.models.arguments import is_real, is_whole, row_seeds
from mdn_jax.models.fields import require

MAX_BIAS = 100.0
"""The largest number in `Sampling.logit_bias`."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; what it says applies in the order of the fields."""

    vocab_limit: int | None = None
    """Only token ids below this; None: the whole vocabulary."""

    logit_bias: Mapping[int, float] | None = None
    """Token ids and what is added to their logits, from -100 to 100; None: nothing."""

    repetition_penalty: float = 1.0
    """Logits of tokens that the row has had: divided by this where positive, else multiplied."""

    temperature: float = 1.0
    """The logits are divided by this; 0: always the likeliest token."""

    top_k: int | None = None
    """Only the `top_k` likeliest tokens; None: all."""

    top_p: float = 1.0
    """Only the fewest likeliest tokens that together have this probability."""

    min_p: float = 0.0
    """Only tokens at least this times as likely as the likeliest; 0: all."""

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
        fits = is_real(self.min_p) and self.min_p <= 1
        require("min_p", self.min_p, "a number from 0 to 1", fits)
        bias = self.logit_bias
        expected = "token ids with numbers from -100 to 100, or None"
        require("logit_bias", bias, expected, bias is None or isinstance(bias, Mapping))
        for token, value in (bias or {}).items():
            fits = is_whole(token, 0) and is_real(value, -MAX_BIAS) and value <= MAX_BIAS
            require("logit_bias", {token: value}, expected, fits)


class SamplingArrays(NamedTuple):
    """`Sampling` of every row as arrays: data of a compiled program; a pytree.

    Attributes:
      temperature: float32, as the next three (float64 for logits in float64).
      top_p: 1: all tokens.
      min_p: 0: all tokens.
      repetition_penalty: 1: none.
      top_k: int32; the vocabulary: all tokens.
      vocab_limit: int32.
      seed: uint32.
      bias: what is added to the logits; None: nothing, which is another program than zeros.
    """

    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    top_k: Int[Array, " B"]
    vocab_limit: Int[Array, " B"]
    seed: Int[Array, " B"]
    bias: Float[Array, "B vocab"] | None


def sampling_arrays(
    sampling: Sampling | Sequence[Sampling] | None,
    rows: int,
    *,
    vocab_size: int,
    seed: int | Sequence[int] = 0,
    dtype: jax.typing.DTypeLike = jnp.float32,
    bias: bool | None = None,
) -> SamplingArrays:
    """The arrays of some rows, on the default device.

    Args:
      sampling: one for all rows, or one a row; None: draws from the model's distribution.
      rows: how many.
      vocab_size: of the model.
      seed: of the first row, row `i` has `seed + i`; or the seeds of all rows.
      dtype: of the logits.
      bias: whether there is an array of biases, zeros where a row has none; None: where a row has
        some.

    Raises:
      ValueError: an argument that does not fit, by name.
    """
    given = _of_rows(sampling, rows)
    dtype = jnp.dtype(dtype)

    def numbers(name: str) -> Any:
        values = [getattr(one, name) for one in given]
        return np.asarray([_within(x, dtype) if x else 0.0 for x in values], dtype)

    def counts(name: str) -> Any:
        values = [getattr(one, name) for one in given]
        return np.asarray([min(x or vocab_size, vocab_size) for x in values], np.int32)

    wanted = any(one.logit_bias for one in given) if bias is None else bias
    biases: Any = np.zeros((rows, vocab_size), dtype) if wanted else None
    for row, one in enumerate(given):
        for token, value in (one.logit_bias or {}).items():
            if token >= vocab_size or biases is None:
                expected = f"token ids from 0 to {vocab_size - 1}" if wanted else "none"
                raise ValueError(f"logit_bias: expected {expected}, got {token}")
            biases[row, token] = value
    seeds: Any = np.asarray(row_seeds(seed, rows), np.uint32)
    arrays = SamplingArrays(
        temperature=numbers("temperature"),
        top_p=numbers("top_p"),
        min_p=numbers("min_p"),
        repetition_penalty=numbers("repetition_penalty"),
        top_k=counts("top_k"),
        vocab_limit=counts("vocab_limit"),
        seed=seeds,
        bias=biases,
    )
    return jax.device_put(arrays)


def _of_rows(sampling: Sampling | Sequence[Sampling] | None, rows: int) -> list[Sampling]:
    if sampling is None:
        sampling = Sampling()
    if isinstance(sampling, Sampling):
        return [sampling] * rows
    listed = isinstance(sampling, Sequence)
    fits = listed and all(isinstance(one, Sampling) for one in sampling)
    require("sampling", sampling, "a Sampling, one a row, or None", fits)
    if len(sampling) != rows:
        raise ValueError(f"sampling: expected one or {rows} of them (rows), got {len(sampling)}")
    return list(sampling)


def _within(value: float, dtype: jnp.dtype) -> float:
    """The closest to a positive number with a normal value and reciprocal in the dtype."""
    smallest = float(jnp.finfo(dtype).tiny)
    return float(np.clip(value, smallest, 1 / smallest))


GREEDY, PLAIN, RANKED = 0, 1, 2
"""What the rows of a batch need at most: the likeliest token, a draw, the tokens in order."""


def needed(sampling: SamplingArrays, rows: Bool[Array, " B"] | None = None) -> Int[Array, ""]:
    """What these rows (None: all) need at most."""
    rows = jnp.ones_like(sampling.seed, bool) if rows is None else rows
    drawn = rows & (sampling.temperature > 0)
    return jnp.any(drawn).astype(jnp.int32) + jnp.any(drawn & _ranked(sampling))


def _ranked(sampling: SamplingArrays) -> Bool[Array, " B"]:
    """Rows that need the tokens in order."""
    return (sampling.top_k < sampling.vocab_limit) | (sampling.top_p < 1)


def filtered_logits(
    logits: Float[Array, "B vocab"],
    seen: Bool[Array, "B vocab"],
    sampling: SamplingArrays,
) -> Float[Array, "B vocab"]:
    """The logits to draw from; -inf for tokens that are out. Ties go to the lower token id.

    Args:
      logits: of the next token.
      seen: tokens that each row has had.
      sampling: what to apply; with temperature 0 only one token stays.
    """
    logits = _adjusted(logits, seen, sampling)
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    greedy = jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
    drawn = lax.cond(needed(sampling) == RANKED, _by_rank, _plain, logits, sampling)
    return jnp.where((sampling.temperature == 0)[:, None], greedy.astype(drawn.dtype), drawn)


def draw(
    logits: Float[Array, "B vocab"],
    seen: Bool[Array, "B vocab"],
    position: Int[Array, " B"],
    sampling: SamplingArrays,
    need: Int[Array, ""] | None = None,
) -> Int[Array, " B"]:
    """One token a row, a function of the row's own logits, tokens, seed and position only.

    Where the largest logit is not finite (there is nan among them, or inf), nothing can be drawn:
    the token is -1.

    Args:
      logits: of the next token.
      seen: tokens that each row has had.
      position: number of tokens that each row has had.
      sampling: how they are drawn.
      need: what the rows that count need at most, the others get any token; None: all count.
    """
    drawable = jnp.isfinite(jnp.max(logits, axis=-1))
    best = jnp.argmax(_adjusted(logits, seen, sampling), axis=-1)

    def one(logits: Array, seed: Array, position: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), logits)

    def drawn(filters: Any) -> Array:
        # adjusted again: what only the likeliest token needs is then never written to memory
        own = filters(_adjusted(logits, seen, sampling), sampling)
        tokens = jax.vmap(one)(own, sampling.seed, position)
        return jnp.where(sampling.temperature == 0, best, tokens)

    branches = [lambda: best, lambda: drawn(_plain), lambda: drawn(_by_rank)]
    tokens = lax.switch(needed(sampling) if need is None else need, branches)
    return jnp.where(drawable, tokens, -1).astype(jnp.int32)


def _adjusted(logits: Array, seen: Array, sampling: SamplingArrays) -> Array:
    """After limit, bias and penalty."""
    if sampling.bias is not None:
        logits = logits + sampling.bias.astype(logits.dtype)
    largest = jnp.finfo(logits.dtype).max
    penalty = sampling.repetition_penalty.astype(logits.dtype)[:, None]
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    penalised = jnp.clip(penalised, -largest, largest)
    logits = jnp.where(seen & (penalty != 1), penalised, logits)
    inside = jnp.arange(logits.shape[-1]) < sampling.vocab_limit[:, None]
    return jnp.where(inside, logits, -jnp.inf)


def _scaled(logits: Array, sampling: SamplingArrays) -> Array:
    """After the temperature.

    Of the likeliest there is 0 at any temperature, and the others fall to -inf where it is small.
    """
    temperature = sampling.temperature.astype(logits.dtype)[:, None]
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    return logits / jnp.where(temperature > 0, temperature, 1)


def _likely(logits: Array, sampling: SamplingArrays) -> Array:
    """Tokens likely enough beside the likeliest, whose logit is 0."""
    least = jnp.log(sampling.min_p.astype(logits.dtype))[:, None]
    return jnp.where(logits >= least, logits, -jnp.inf)


def _plain(logits: Array, sampling: SamplingArrays) -> Array:
    return _likely(_scaled(logits, sampling), sampling)


def _by_rank(logits: Array, sampling: SamplingArrays) -> Array:
    logits = _scaled(logits, sampling)
    top_p = sampling.top_p.astype(logits.dtype)[:, None]
    order = jnp.argsort(-logits, axis=-1, stable=True)
    kept = jnp.arange(logits.shape[-1]) < sampling.top_k[:, None]  # by rank
    ranked = jnp.where(kept, jnp.take_along_axis(logits, order, axis=-1), -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept &= (before < top_p) | (top_p == 1)
    rows = jnp.arange(len(kept))[:, None]
    kept = jnp.zeros_like(kept).at[rows, order].set(kept, unique_indices=True)  # by token
    return _likely(jnp.where(kept, logits, -jnp.inf), sampling)
