"""What is static of a model in a compiled program."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mdn_jax.layers.projection import wide_projection
from mdn_jax.layers.sharding import named_axes
from mdn_jax.models.causal_lm import MDNForCausalLM, ModelCache
from mdn_jax.models.joined import joins, whole_output, with_joined_products


class LayerSteps(NamedTuple):
    """Steps of single tokens by the model's own layers; `fused.FusedSteps` has the same methods.

    Attributes:
      model: the model.
      output: its output projection in the dtype of the computation, with any columns behind; None:
        the model's own.
    """

    model: MDNForCausalLM
    output: Float[Array, "hidden columns"] | None = None

    def enter(self, cache: ModelCache) -> ModelCache:
        """What a loop keeps in place of a cache: the same."""
        return cache

    def step(
        self, cache: ModelCache, tokens: Int[Array, " B"], active: Array | None = None
    ) -> tuple[Float[Array, "B vocab"], ModelCache]:
        """Logits after one more token of every row.

        Args:
          cache: before the tokens.
          tokens: ids.
          active: `[B]`, rows that take their token; others stay as they are, and their logits mean
            nothing. None: all.

        Returns:
          The logits, float32 (float64 for float64), and the cache after the tokens.
        """
        lengths = None if active is None else active.astype(jnp.int32)
        h, cache = self.model.hidden(tokens[:, None], cache=cache, lengths=lengths)
        if self.output is None:
            return self.model.logits(h[:, 0]), cache
        return wide_projection(h[:, 0], self.output)[:, : self.model.config.vocab_size], cache

    def leave(self, cache: ModelCache) -> ModelCache:
        """The cache of what a loop has kept: the same."""
        return cache


def layer_steps(model: MDNForCausalLM) -> LayerSteps:
    """Steps by a model; called before a loop, and outside it, for it joins matrices on a GPU."""
    if not joins():
        return LayerSteps(model)
    return LayerSteps(with_joined_products(model), whole_output(model))


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

    def steps(self, arrays: Sequence[Array]) -> LayerSteps:
        """Steps of single tokens by the model of these arrays."""
        return layer_steps(self.model(arrays))
