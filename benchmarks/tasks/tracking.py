"""Tasks of state tracking: the product so far of a sequence of group elements."""

import dataclasses
import functools
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray
from numpy.typing import NDArray

from benchmarks.tasks.task import Examples, require

Group = Literal["z2", "z3", "z5", "s5"]


@dataclasses.dataclass(frozen=True)
class Tracking:
    """The word problem of a group (arXiv 2404.08819): after each element, the product so far.

    Attributes:
      group: "z2", "z3" or "z5": the ones so far, counted modulo 2 (parity), 3 or 5, of bits; "s5":
        the 120 permutations of five things.
      length: elements in a row.
    """

    group: Group = "z2"
    length: int = 256

    def __post_init__(self) -> None:
        require("length", self.length, "at least 1", self.length >= 1)

    @property
    def vocab_size(self) -> int:
        """Elements of the group."""
        return len(products(self.group))

    @property
    def kinds(self) -> int:
        """Different tokens: of a cyclic group 0 and 1 alone."""
        return self.vocab_size if self.group == "s5" else 2

    @property
    def levels(self) -> tuple[int, ...]:
        """The length."""
        return (self.length,)

    def sample(self, key: PRNGKeyArray, rows: int, level: Int[Array, ""]) -> Examples:
        """Random rows."""
        table = jnp.asarray(products(self.group))
        tokens = jax.random.randint(key, (rows, self.length), 0, self.kinds)

        def multiply(first: Array, second: Array) -> Array:
            return table[second, first]

        return Examples(tokens, jax.lax.associative_scan(multiply, tokens, axis=1))


@functools.cache
def products(group: Group) -> NDArray[np.int32]:
    """`products[a, b]` is the index of `a` after `b`."""
    if group != "s5":
        numbers = np.arange(int(group[1:]), dtype=np.int32)
        return (numbers[:, None] + numbers) % len(numbers)
    elements = list(itertools.permutations(range(5)))
    index = {element: i for i, element in enumerate(elements)}
    return np.array([[index[tuple(a[i] for i in b)] for b in elements] for a in elements], np.int32)
