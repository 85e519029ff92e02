"""What takes single tokens: the model's own layers, or the GPU kernels of `fused.py`."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mdn_jax.models.causal_lm import MDNForCausalLM, ModelCache
from mdn_jax.models.fused import fused_lacks, fused_structure, fused_weights

StepKind = Literal["layers", "fused"]
"""The model's own layers, or the kernels."""


class LayerStructure(NamedTuple):
    """What is static of the model's own steps in a compiled program."""

    graph: Any

    def steps(self, weights: Any) -> "LayerSteps":
        """The steps with these weights."""
        return LayerSteps(nnx.merge(self.graph, weights))


class LayerSteps(NamedTuple):
    """Steps of single tokens by the model's layers."""

    model: MDNForCausalLM

    def enter(self, cache: ModelCache) -> ModelCache:
        """What a loop keeps in place of a cache: the same."""
        return cache

    def step(
        self, cache: ModelCache, tokens: Int[Array, " B"], active: Array | None = None
    ) -> tuple[Float[Array, "B vocab"], ModelCache]:
        """Logits after one more token of every row; rows that are not active stay as they are."""
        lengths = None if active is None else active.astype(jnp.int32)
        logits, cache = self.model(tokens[:, None], cache=cache, lengths=lengths)
        return logits[:, 0], cache

    def leave(self, cache: ModelCache) -> ModelCache:
        """The cache of what a loop has kept: the same."""
        return cache


def fused_steps(model: MDNForCausalLM, steps: StepKind | None) -> tuple[Any, Any] | None:
    """The kernels' steps and weights; None for the model's own."""
    if steps == "layers":
        return None
    lacking = fused_lacks(model)
    if lacking and steps == "fused":
        raise ValueError(f'steps: "fused" expects {lacking}')
    return None if lacking else (fused_structure(model), fused_weights(model))
