"""What takes single tokens: the model's own layers, or the GPU kernels of `fused.py`."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mdn_jax.layers.momentum_deltanet import MDNCache
from mdn_jax.models.causal_lm import MDNForCausalLM, ModelCache
from mdn_jax.models.fused import fused_cache_lacks, fused_lacks, fused_structure, fused_weights
from mdn_jax.ops.state import CompactState

StepKind = Literal["layers", "kernels"]

MOST_ROWS = 64
"""Rows up to which the kernels are measured to be faster than the layers."""


class KernelSteps:
    """The kernels' steps of a model, where they are asked for or are the faster ones.

    Args:
      model: the model.
      steps: "layers", "kernels", or None: kernels for a model of 16 bits on a GPU that supports
        them, caches that they can go on from, and up to `MOST_ROWS` rows.

    Raises:
      ValueError: a kind that there is not, or kernels for a model that they do not support.
    """

    def __init__(self, model: MDNForCausalLM, steps: StepKind | None) -> None:
        if steps not in (None, "layers", "kernels"):
            raise ValueError(f'steps: expected "layers", "kernels" or None, got {steps!r}')
        self._steps = steps
        self._model = model
        self._made: tuple[Any, Any] | None = None
        self._fits = steps == "kernels" or (steps is None and _faster(model))
        if steps == "kernels":
            if lacking := fused_lacks(model):
                raise ValueError(f'steps: "kernels" expects {lacking}; use "layers"')
            self._made = fused_structure(model), fused_weights(model)

    def for_cache(self, cache: ModelCache, rows: int) -> tuple[Any, Any] | None:
        """Structure and arrays of the kernels' steps on from a cache; None: the layers take them.

        The weights are joined when they are first needed.

        Raises:
          ValueError: kernels were asked for and cannot go on from this cache.
        """
        if not self._fits:
            return None
        lacking = fused_cache_lacks(cache)
        if self._steps == "kernels" and lacking:
            raise ValueError(f'state: steps "kernels" expects {lacking}; use "layers"')
        if lacking or (self._steps is None and (rows > MOST_ROWS or _compact(cache))):
            return None
        if self._made is None:
            self._made = fused_structure(self._model), fused_weights(self._model)
        return self._made


def _compact(cache: ModelCache) -> bool:
    """Whether states are kept in 16 bits: not measured yet."""
    return any(isinstance(x, MDNCache) and isinstance(x.state, CompactState) for x in cache)


def _faster(model: MDNForCausalLM) -> bool:
    """Whether the kernels can run, and are measured to be faster."""
    parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
    if any(isinstance(x, jax.core.Tracer) for x in parameters):
        return False
    on_gpu = all(device.platform == "gpu" for x in parameters for device in x.devices())
    return on_gpu and jnp.dtype(model.dtype).itemsize == 2 and fused_lacks(model) is None
