"""What is static of a model in a compiled program."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from mdn_jax.layers.sharding import named_axes
from mdn_jax.models.causal_lm import MDNForCausalLM


class Structure:
    """Of a model, without its arrays: static in compiled programs, its hash computed once.

    Args:
      graph: of `nnx.split`.
      tree: of the arrays.
    """

    def __init__(self, graph: Any, tree: Any) -> None:
        self._key = (graph, tree, named_axes())  # of the ambient mesh: another trace
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Structure) and self._key == other._key

    def model(self, arrays: Sequence[Array]) -> MDNForCausalLM:
        """The model of these arrays."""
        graph, tree, _ = self._key
        model: MDNForCausalLM = nnx.merge(graph, jax.tree.unflatten(tree, arrays))
        return model
