"""Floating-point operations that the model asks for, and what devices can do at most."""

from typing import Any

import jax

from mdn_jax import MDNConfig
from mdn_jax.models import Mixer

PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
}
"""Operations a second of dense bfloat16 products by device kind, from NVIDIA's data sheets."""


# an entry of one state and token, of the recurrence
_STATE_FLOPS: dict[Mixer, int] = {
    "mdn": 12,
    "titans": 12,
    "gdn": 6,
    "kda": 6,
    "comba": 6,
    "gdn2": 6,
    "mamba2": 4,
    "mamba3": 6,
    "attention": 0,
}


def projection_sizes(params: Any) -> int:
    """Entries of the matrices that every token is multiplied with, the output projection apart.

    Args:
      params: of the model, or their shapes.
    """

    def size(path: tuple[Any, ...], x: Any) -> int:
        projection = x.ndim == 2 and any(str(entry.key).endswith("_proj") for entry in path)
        return x.size if projection else 0

    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(size, params)))


def flops_per_token(config: MDNConfig, params: Any, sequence_length: int) -> float:
    """Operations of a training step for each token, the forward pass and twice that for the other.

    Products with weights, two operations an entry; with the states of MDN and Titans, twelve an
    entry of one state (six products: read, write, decay and output in the recurrence), of delta
    rules without momentum six, of Mamba-2 four, of Mamba-3, which writes twice, six; of softmax
    attention with the tokens that one sees on average. What rematerialisation repeats and what an
    algorithm in chunks adds is not asked for by the model and not counted.

    Args:
      config: of the model.
      params: its parameters, or their shapes.
      sequence_length: tokens in a row, one document.
    """
    attention = sum(config.is_attention(i) for i in range(config.num_hidden_layers))
    weights = 2 * (projection_sizes(params) + config.hidden_size * config.vocab_size)
    state = config.value_heads * config.head_dim * config.head_v_dim
    states = state * sum(_STATE_FLOPS[mixer] for mixer in config.mixers)
    seen = 0.0
    if attention:
        window = min(config.attention.window_size or sequence_length, sequence_length)
        seen = window - window * (window - 1) / (2 * sequence_length)
    return 3 * (weights + states + attention * 4 * seen * config.hidden_size)


def utilisation(flops_per_second: float, device_kind: str, devices: int = 1) -> float | None:
    """Model FLOPs utilisation (MFU), from 0 to 1; None for a device that is not in `PEAK_FLOPS`."""
    peak = PEAK_FLOPS.get(device_kind)
    return flops_per_second / (peak * devices) if peak else None
