"""What takes single tokens: the model's own layers, or the GPU kernels of `fused.py`."""

from typing import Any, Literal

from mdn_jax.models.causal_lm import MDNForCausalLM
from mdn_jax.models.fused import fused_lacks, fused_structure, fused_weights

StepKind = Literal["layers", "fused"]
"""The model's own layers, or the kernels."""


def check_steps(model: MDNForCausalLM, steps: StepKind | None) -> None:
    """Raises ValueError for a kind that there is not, or that does not support the model."""
    if steps not in ("layers", "fused", None):
        raise ValueError(f'steps: expected "layers", "fused" or None, got {steps!r}')
    if steps == "fused" and (lacking := fused_lacks(model)):
        raise ValueError(f'steps: "fused" expects {lacking}; use "layers", or None for the best')


def fused_steps(model: MDNForCausalLM, steps: StepKind | None) -> tuple[Any, Any] | None:
    """The kernels' structure and arrays; None where the model's own layers take the tokens."""
    if steps == "layers" or fused_lacks(model):
        return None
    return fused_structure(model), fused_weights(model)
