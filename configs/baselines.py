"""The models that the paper compares MDN with, at its two sizes: other mixers, MDN's recipe."""

import dataclasses
from collections.abc import Callable
from typing import Any

from configs import mdn_1_3b, mdn_400m
from mdn_jax.models import Mixer
from train.config import TrainConfig

_SIZES: dict[str, Callable[[], TrainConfig]] = {"400m": mdn_400m.config, "1_3b": mdn_1_3b.config}

_MIXERS: dict[str, tuple[str, Mixer]] = {
    "gdn": ("Gated DeltaNet", "gdn"),
    "comba": ("Comba", "comba"),
    "kda": ("Kimi Delta Attention", "kda"),
    "mamba2": ("Mamba-2", "mamba2"),
    "transformer": ("Transformer", "attention"),
}


def _shape(mixer: Mixer, hidden_size: int) -> dict[str, Any]:
    """Fields in which a model of this width differs from MDN's."""
    if mixer == "kda":
        shape = {"num_heads": hidden_size // 128, "head_dim": 128, "expand_v": 1.0}
        return {"num_hidden_layers": 24, "use_lora_gate": True, **shape}
    if mixer == "mamba2":  # twice the width in heads of 64, one group with a state of 128, no MLP
        heads = {"num_heads": 1, "num_v_heads": 2 * hidden_size // 64}
        widths = {"head_dim": 128, "expand_v": 0.5, "intermediate_size": 0}
        return {"num_hidden_layers": 48, "conv_bias": True, **heads, **widths}
    if mixer == "attention":
        return {"num_hidden_layers": 24, "num_heads": hidden_size // 64}
    return {}


def _baseline(name: str, size: str) -> Callable[[], TrainConfig]:
    title, mixer = _MIXERS[name]

    def config() -> TrainConfig:
        base = _SIZES[size]()
        changes = _shape(mixer, base.model.hidden_size)
        model = dataclasses.replace(base.model, mixer=mixer, **changes)
        return dataclasses.replace(base, name=f"{name}_{size}", model=model)

    config.__doc__ = f"{title} beside the published {size.replace('_', '.').upper()} model."
    return config


BASELINES: dict[str, Callable[[], TrainConfig]] = {
    f"{name}_{size}": _baseline(name, size) for size in _SIZES for name in _MIXERS
}
