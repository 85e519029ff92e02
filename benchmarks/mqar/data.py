"""Rows of multi-query associative recall, as Zoology draws them: pairs, then queries."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

VOCABULARY = 8192
"""Keys are 1 ... 4,095, values 4,096 ... 8,191; noise is any token."""

POWER = 0.01
"""Place `i` of a query, from 1, has a probability proportional to `i^(POWER - 1)`."""

Ints = Int[np.ndarray, "..."]


class Setting(NamedTuple):
    """What rows look like, and how many there are.

    Attributes:
      pairs: of key and value in a row, each of which is asked for once.
      length: tokens in a row.
      rows: number of rows.
    """

    pairs: int
    length: int
    rows: int

    @property
    def name(self) -> str:
        """As records and tables have it."""
        return f"{self.pairs}/{self.length}"

    @property
    def places(self) -> int:
        """Where a query can stand: every second token after the pairs."""
        return (self.length - 2 * self.pairs) // 2


TRAINED: tuple[Setting, ...] = (
    Setting(4, 64, 100_000),
    Setting(8, 128, 20_000),
    Setting(16, 256, 20_000),
    Setting(32, 256, 20_000),
    Setting(64, 256, 20_000),
)
"""Rows of the training."""

MEASURED: tuple[Setting, ...] = (
    Setting(4, 64, 1_000),
    Setting(8, 64, 1_000),
    Setting(16, 64, 1_000),
    Setting(32, 128, 1_000),
    Setting(64, 256, 1_000),
)
"""Rows that accuracy is measured on, with numbers of pairs that the training has."""

EXTRAPOLATED: tuple[Setting, ...] = (Setting(128, 512, 1_000), Setting(256, 1024, 1_000))
"""Rows with more pairs, and longer, than any of the training."""


class Rows(NamedTuple):
    """Rows of one setting.

    Attributes:
      tokens: `[R, T]`, int32.
      places: where the queries stand, those of the first pair first, `[R, n]`, int32.
      answers: what is to be predicted there, `[R, n]`, int32.
    """

    tokens: Ints
    places: Ints
    answers: Ints


def check_setting(setting: Setting, vocabulary: int) -> None:
    """Raises unless rows of the setting can be drawn.

    Raises:
      ValueError: names what does not fit.
    """
    pairs, length, _ = setting
    most = vocabulary // 2 - 1
    if not 1 <= pairs <= most:
        raise ValueError(f"pairs: expected an int from 1 to {most}, got {pairs!r}")
    if length < 4 * pairs or length % 2:
        raise ValueError(f"length: expected an even int >= 4 * pairs = {4 * pairs}, got {length!r}")


def draw_rows(setting: Setting, seed: Sequence[int], vocabulary: int = VOCABULARY) -> Rows:
    """Draws the rows of a setting; the same for the same seed.

    Args:
      setting: pairs, length and number of rows.
      seed: numbers that name the draw, as of `numpy.random.default_rng`.
      vocabulary: kinds of tokens; keys are the lower half without 0, values the upper half.

    Raises:
      ValueError: a setting that does not fit.
    """
    check_setting(setting, vocabulary)
    pairs, length, rows = setting
    half = vocabulary // 2
    random = np.random.default_rng(seed)
    keys = 1 + _distinct(random, rows, pairs, half - 1)
    values = half + _distinct(random, rows, pairs, half)
    tokens = random.integers(vocabulary, size=(rows, length), dtype=np.int32)
    tokens[:, 0 : 2 * pairs : 2] = keys
    tokens[:, 1 : 2 * pairs : 2] = values
    places = 2 * pairs + 2 * _weighted_places(random, rows, pairs, setting.places)
    np.put_along_axis(tokens, places, keys, axis=1)
    return Rows(tokens, places.astype(np.int32), values)


def _distinct(random: np.random.Generator, rows: int, count: int, below: int) -> Ints:
    """`count` different numbers below `below` in every row, in random order (Floyd's method)."""
    chosen = np.empty((rows, count), np.int32)
    for i, last in enumerate(range(below - count, below)):
        draw = random.integers(last + 1, size=rows, dtype=np.int32)
        taken = (chosen[:, :i] == draw[:, None]).any(axis=1)
        chosen[:, i] = np.where(taken, last, draw)
    return random.permuted(chosen, axis=1)


def _weighted_places(random: np.random.Generator, rows: int, count: int, below: int) -> Ints:
    """`count` different places of every row, one after the other, from those that are left.

    The `count` earliest of independent exponential times with the weights as rates are in order a
    draw without replacement.
    """
    weights = place_weights(below)
    times = random.exponential(size=(rows, below)) / weights
    return np.argsort(times, axis=1)[:, :count]


def place_weights(places: int) -> Float[np.ndarray, " N"]:
    """Probabilities of the places, the first one first."""
    weights = np.arange(1, places + 1) ** (POWER - 1)
    return weights / weights.sum()
