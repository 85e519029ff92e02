"""What takes single tokens: the model's own layers, or the GPU kernels of `fused.py`."""

from typing import Any, Literal

from mdn_jax.models.causal_lm import MDNForCausalLM
from mdn_jax.models.fused import fused_lacks, fused_structure, fused_weights

StepKind = Literal["layers", "kernels"]


def kernel_steps(model: MDNForCausalLM, steps: StepKind) -> tuple[Any, Any] | None:
    """Structure and arrays of the kernels' steps; None for those of the model's own layers.

    Raises:
      ValueError: a kind that there is not, or kernels for a model that they do not support.
    """
    if steps == "layers":
        return None
    if steps != "kernels":
        raise ValueError(f'steps: expected "layers" or "kernels", got {steps!r}')
    if lacking := fused_lacks(model):
        raise ValueError(f'steps: "kernels" expects {lacking}; use "layers"')
    return fused_structure(model), fused_weights(model)
