"""Tasks of recall: what was read must be found again."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from benchmarks.tasks.task import IGNORED, Examples, ignored, require, scattered


@dataclasses.dataclass(frozen=True)
class Recall:
    """Multi-query associative recall (MQAR, arXiv 2312.04927).

    Keys, each followed by its value; `gap` tokens of noise; then every key once more, in another
    order, where its value must be predicted. Rows are as long as with most pairs and begin with
    noise if they have fewer.

    Attributes:
      pairs: different keys in a row, one number or several.
      gap: tokens between the last pair and the first question.
      keys: keys there are, and values as well.
      noise: kinds of noise tokens.
    """

    pairs: tuple[int, ...] = (16,)
    gap: int = 0
    keys: int = 256
    noise: int = 32

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError("pairs: expected at least one number, got none")
        for pairs in self.pairs:
            require("pairs", pairs, f"from 1 to keys = {self.keys}", 1 <= pairs <= self.keys)
        require("gap", self.gap, "at least 0", self.gap >= 0)
        require("noise", self.noise, "at least 1", self.noise >= 1)

    @property
    def vocab_size(self) -> int:
        """Keys, values, noise."""
        return 2 * self.keys + self.noise

    @property
    def length(self) -> int:
        """Tokens in a row."""
        return 3 * max(self.pairs) + self.gap

    @property
    def levels(self) -> tuple[int, ...]:
        """Pairs."""
        return self.pairs

    def sample(self, key: PRNGKeyArray, rows: int, level: Int[Array, ""]) -> Examples:
        """Random rows."""
        of_keys, of_values, of_noise, of_order = jax.random.split(key, 4)
        most = max(self.pairs)
        shape = (rows, most)
        draw = jax.random.uniform(of_keys, (rows, self.keys))
        keys = jax.lax.top_k(draw, most)[1]  # different ones, in random order
        values = self.keys + jax.random.randint(of_values, shape, 0, self.keys)
        absent = jnp.arange(most) < most - level  # the first pairs of a row, if it has fewer
        order = jnp.argsort(
            jax.random.uniform(of_order, shape) + absent, axis=1
        )  # absent ones last
        pairs = jnp.stack([keys, values], axis=2).reshape(rows, -1)
        questions = jnp.take_along_axis(keys, order, axis=1)
        answers = jnp.take_along_axis(values, order, axis=1)

        gap, asked = jnp.zeros(self.gap, bool), jnp.arange(most) < level
        said = jnp.concatenate([jnp.repeat(~absent, 2), gap, asked])
        nothing = ignored(rows, 2 * most + self.gap)
        text = jnp.concatenate([pairs, nothing[:, 2 * most :], questions], axis=1)
        noise = jax.random.randint(of_noise, (rows, self.length), 0, self.noise)
        return Examples(
            jnp.where(said, text, 2 * self.keys + noise),
            jnp.concatenate([nothing, jnp.where(asked, answers, IGNORED)], axis=1),
        )


@dataclasses.dataclass(frozen=True)
class Copying:
    """Selective copying (arXiv 2312.00752): tokens scattered in noise, then asked for in order.

    Attributes:
      count: tokens to remember.
      noise_length: length of the part in which they are scattered.
      kinds: kinds of tokens to remember.
    """

    count: int = 16
    noise_length: int = 256
    kinds: int = 16

    def __post_init__(self) -> None:
        expected = f"from 1 to noise_length = {self.noise_length}"
        require("count", self.count, expected, 1 <= self.count <= self.noise_length)
        require("kinds", self.kinds, "at least 2", self.kinds >= 2)

    @property
    def vocab_size(self) -> int:
        """The tokens, noise, the question."""
        return self.kinds + 2

    @property
    def length(self) -> int:
        """Tokens in a row."""
        return self.noise_length + self.count

    @property
    def levels(self) -> tuple[int, ...]:
        """Tokens to remember."""
        return (self.count,)

    def sample(self, key: PRNGKeyArray, rows: int, level: Int[Array, ""]) -> Examples:
        """Random rows."""
        of_values, of_places = jax.random.split(key)
        values = jax.random.randint(of_values, (rows, self.count), 0, self.kinds)
        places = scattered(of_places, rows, self.count, self.noise_length)
        noise = jnp.full((rows, self.noise_length), self.kinds)
        text = noise.at[jnp.arange(rows)[:, None], places].set(values)
        questions = jnp.full((rows, self.count), self.kinds + 1)
        tokens = jnp.concatenate([text, questions], axis=1)
        targets = jnp.concatenate([ignored(rows, self.noise_length), values], axis=1)
        return Examples(tokens, targets)


@dataclasses.dataclass(frozen=True)
class Induction:
    """Induction head: a special token and its successor once in random text; what follows it?

    Attributes:
      length: tokens in a row; the last one is the special token again.
      kinds: kinds of ordinary tokens.
    """

    length: int = 256
    kinds: int = 16

    def __post_init__(self) -> None:
        require("length", self.length, "at least 3", self.length >= 3)
        require("kinds", self.kinds, "at least 2", self.kinds >= 2)

    @property
    def vocab_size(self) -> int:
        """Ordinary tokens and the special one."""
        return self.kinds + 1

    @property
    def levels(self) -> tuple[int, ...]:
        """The length."""
        return (self.length,)

    def sample(self, key: PRNGKeyArray, rows: int, level: Int[Array, ""]) -> Examples:
        """Random rows."""
        of_text, of_place = jax.random.split(key)
        text = jax.random.randint(of_text, (rows, self.length), 0, self.kinds)
        place = jax.random.randint(of_place, (rows, 1), 0, self.length - 2)
        row = jnp.arange(rows)[:, None]
        answer = text[row, place + 1]
        tokens = text.at[row, place].set(self.kinds).at[:, -1].set(self.kinds)
        return Examples(tokens, jnp.concatenate([ignored(rows, self.length - 1), answer], axis=1))


class NeedleText(NamedTuple):
    """The parts of a row of `Needle`, in tokens of any kind.

    Attributes:
      haystack: what repeats itself.
      told: before the number.
      end: behind it.
      question: before the number at the end of the row.
      digits: the token of each digit.
    """

    haystack: tuple[int, ...]
    told: tuple[int, ...]
    end: tuple[int, ...]
    question: tuple[int, ...]
    digits: tuple[int, ...]

    @classmethod
    def of(cls, encode: Callable[[str], Sequence[int]]) -> "NeedleText":
        """The text in the tokens of a tokenizer.

        Raises:
          ValueError: a digit that is not one token.
        """
        digits = [tuple(encode(digit)) for digit in "0123456789"]
        if any(len(digit) != 1 for digit in digits):
            raise ValueError(f"digits: expected a token each, got {digits}")
        haystack, told, end, question = (
            tuple(encode(part)) for part in (_HAYSTACK, _NEEDLE, ". ", _QUESTION)
        )
        return cls(haystack, told, end, question, tuple(digit[0] for digit in digits))

    def least(self, digits: int) -> int:
        """Tokens of the shortest row with a number of so many digits."""
        return len(self.told) + len(self.end) + len(self.question) + 2 * digits - 1


_HAYSTACK = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back. "
_NEEDLE = " The pass key is "
_QUESTION = " What is the pass key? The pass key is "
NEEDLE_BYTES = NeedleText.of(lambda text: list(text.encode()))


def needle_rows(
    key: PRNGKeyArray, rows: int, length: int, digits: int, text: NeedleText
) -> Examples:
    """Rows with a number at a random depth of a text that repeats itself, then the question.

    Args:
      key: of the random numbers.
      rows: in number.
      length: tokens of a row, at least `text.least(digits)`.
      digits: of the number; the targets are these, at the end of the row.
      text: in tokens.
    """
    of_digits, of_depth, of_start = jax.random.split(key, 3)
    drawn = jax.random.randint(of_digits, (rows, digits), 0, 10)
    number = jnp.asarray(text.digits)[drawn]
    size = length - len(text.question) - digits + 1
    told = len(text.told) + digits + len(text.end)
    depth = jax.random.randint(of_depth, (rows, 1), 0, size - told + 1)
    start = jax.random.randint(of_start, (rows, 1), 0, len(text.haystack))
    hay = jnp.asarray(text.haystack)[(start + jnp.arange(size)) % len(text.haystack)]

    def repeated(part: Sequence[int]) -> Array:
        return jnp.broadcast_to(jnp.asarray(part, jnp.int32), (rows, len(part)))

    needle = jnp.concatenate([repeated(text.told), number, repeated(text.end)], axis=1)
    hay = hay.at[jnp.arange(rows)[:, None], depth + jnp.arange(told)].set(needle)
    tokens = jnp.concatenate([hay, repeated(text.question), number[:, :-1]], axis=1)
    return Examples(tokens, jnp.concatenate([ignored(rows, length - digits), number], axis=1))


@dataclasses.dataclass(frozen=True)
class Needle:
    """Passkey retrieval: a number at a random depth of a text that repeats itself, in bytes.

    Attributes:
      length: bytes in a row.
      digits: of the number.
    """

    length: int = 1024
    digits: int = 5

    def __post_init__(self) -> None:
        require("digits", self.digits, "at least 1", self.digits >= 1)
        least = NEEDLE_BYTES.least(self.digits)
        require("length", self.length, f"at least {least}", self.length >= least)

    @property
    def vocab_size(self) -> int:
        """Bytes."""
        return 256

    @property
    def levels(self) -> tuple[int, ...]:
        """The length."""
        return (self.length,)

    def sample(self, key: PRNGKeyArray, rows: int, level: Int[Array, ""]) -> Examples:
        """Random rows."""
        return needle_rows(key, rows, self.length, self.digits, NEEDLE_BYTES)
