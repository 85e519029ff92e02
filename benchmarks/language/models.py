"""The models of `python -m benchmarks language`, equal in parameters."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from benchmarks.equal_models import SHOWN, model_config
from mdn_jax import MDNConfig
from mdn_jax.models import Mixer

Hybrid = Literal["mdn", "gdn"]
Ablation = Literal[
    "no-momentum", "no-output-correction", "no-beta-bound", "no-alpha-bound", "no-mu-clamp"
]

# MDN's fields without one of its parts
_ABLATIONS: dict[Ablation, dict[str, Any]] = {
    "no-momentum": {"use_momentum": False},
    "no-output-correction": {"use_output_correction": False},
    "no-beta-bound": {"bound": "alpha"},
    "no-alpha-bound": {"bound": "beta"},
    "no-mu-clamp": {"min_log_mu": None},
}


class Model(NamedTuple):
    """A model to train.

    Attributes:
      name: in records, and of its style.
      shown: in tables.
      config: of the model.
      rate_of: name of the model whose best learning rate it has; None: its own.
    """

    name: str
    shown: str
    config: MDNConfig
    rate_of: str | None = None


def make_models(
    mixers: Sequence[Mixer],
    hybrids: Sequence[Hybrid],
    ablations: Sequence[Ablation],
    *,
    vocab_size: int,
    hidden_size: int,
    layers: int,
    heads: int,
) -> list[Model]:
    """The models, with the parameters of MDN.

    Args:
      mixers: one in all layers.
      hybrids: mixers of models with softmax attention in every fourth layer.
      ablations: MDN without one of its parts, at MDN's learning rate.
      vocab_size: kinds of tokens.
      hidden_size: width.
      layers: number of layers.
      heads: key heads.
    """

    def make(mixer: Mixer, attention_every: int | None = None) -> MDNConfig:
        return model_config(
            mixer,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            layers=layers,
            heads=heads,
            equal="parameters",
            attention_every=attention_every,
        )

    models = [Model(mixer, SHOWN[mixer], make(mixer)) for mixer in mixers]
    models += [Model(f"{x}_hybrid", f"{SHOWN[x]}, 3:1 attention", make(x, 4)) for x in hybrids]
    for ablation in ablations:
        config = dataclasses.replace(make("mdn"), **_ABLATIONS[ablation])
        shown = f"MDN, {ablation.replace('-', ' ')}"
        models.append(Model(ablation, shown, config, rate_of="mdn"))
    return models
