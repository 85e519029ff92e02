"""What a task is: rows of tokens with the targets that count, drawn on the device."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

IGNORED = -100
"""Target of a token whose prediction does not count."""


class Examples(NamedTuple):
    """Rows of a task.

    Attributes:
      tokens: `[B, T]`.
      targets: what is to be predicted at each token, `[B, T]`; -100: nothing.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]


class Task(Protocol):
    """A task; the fields of its dataclass are its knobs."""

    @property
    def vocab_size(self) -> int:
        """Kinds of tokens."""

    @property
    def length(self) -> int:
        """Tokens in a row."""

    @property
    def levels(self) -> tuple[int, ...]:
        """How hard rows may be, in the unit of the figure; trained in turn, scored one by one."""

    def sample(self, key: PRNGKeyArray, rows: int, level: Int[Array, ""]) -> Examples:
        """Random rows of one level, the same for the same key; can be compiled."""


def require(name: str, value: int, expected: str, fits: bool) -> None:
    """Raises ValueError unless the value fits."""
    if not fits:
        raise ValueError(f"{name}: expected an int {expected}, got {value!r}")


def ignored(rows: int, count: int) -> Int[Array, "B N"]:
    """Targets that do not count."""
    return jnp.full((rows, count), IGNORED)


def scattered(key: PRNGKeyArray, rows: int, count: int, length: int) -> Int[Array, "B N"]:
    """`count` different places below `length` in every row, ascending."""
    draw = jax.random.uniform(key, (rows, length))
    return jnp.sort(jax.lax.top_k(draw, count)[1], axis=1)
