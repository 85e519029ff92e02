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

Group = Literal["z2", "s5"]


@dataclasses.dataclass(frozen=True)
class Tracking:
    """The word problem of a group (arXiv 2404.08819): after each element, the product so far.

    Attributes:
      group: "z2" (parity of bits) or "s5" (the 120 permutations of five things).
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
    def levels(self) -> tuple[int, ...]:
        """The length."""
        return (self.length,)

    def sample(self, key: PRNGKeyArray, rows: int, level: Int[Array, ""]) -> Examples:
        """Random rows."""
        table = jnp.asarray(products(self.group))
        tokens = jax.random.randint(key, (rows, self.length), 0, len(table))

        def multiply(first: Array, second: Array) -> Array:
            return table[second, first]

        return Examples(tokens, jax.lax.associative_scan(multiply, tokens, axis=1))


@functools.cache
def products(group: Group) -> NDArray[np.int32]:
    """`products[a, b]` is the index of `a` after `b`."""
    count = 2 if group == "z2" else 5
    elements = list(itertools.permutations(range(count)))
    index = {element: i for i, element in enumerate(elements)}
    return np.array([[index[tuple(a[i] for i in b)] for b in elements] for a in elements], np.int32)
