"""Mixers under test: MDN and Gated DeltaNet, each with and without negative eigenvalues."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from benchmarks.equal_models import model_config
from benchmarks.initial_factors import PUBLISHED_FACTOR, SLOW_FACTOR
from mdn_jax import MDNConfig
from mdn_jax.models import Mixer

# without the lower bound of log mu too: with it the momentum never ends, as in GDN it does
_FREE: Mapping[str, Any] = {"min_log_mu": None}

Variant = Literal["mdn", "mdn_slow", "mdn_stable", "mdn_unbounded", "gdn", "gdn_negative"]
"""MDN as published, slow to forget at first, free within the region of stability, and without
bounds, the last two without that of log mu too; Gated DeltaNet with a step size up to 1 and 2."""


class _Kind(NamedTuple):
    name: str
    mixer: Mixer
    fields: Mapping[str, Any]
    largest_factor: float = PUBLISHED_FACTOR


_KINDS: Mapping[Variant, _Kind] = {
    "mdn": _Kind("MDN", "mdn", {}),
    "mdn_slow": _Kind("MDN, slow to forget", "mdn", {}, SLOW_FACTOR),
    "mdn_stable": _Kind("MDN, stable region", "mdn", {"bound": "stable", **_FREE}),
    "mdn_unbounded": _Kind("MDN, no bounds", "mdn", {"bound": "none", **_FREE}),
    "gdn": _Kind("GDN", "gdn", {}),
    "gdn_negative": _Kind("GDN, negative eigenvalues", "gdn", {"allow_neg_eigval": True}),
}

NAMES: Mapping[str, str] = {variant: kind.name for variant, kind in _KINDS.items()}
"""Of the variants, in tables."""


def variant_config(
    variant: Variant, *, vocab_size: int, hidden_size: int, layers: int, heads: int
) -> MDNConfig:
    """The model of a variant; all have states of one size.

    Args:
      variant: which.
      vocab_size: kinds of tokens.
      hidden_size: width, a multiple of `2 * heads`.
      layers: number of layers.
      heads: key heads.

    Raises:
      ValueError: heads that do not fit.
    """
    kind = _KINDS[variant]
    config = model_config(
        kind.mixer,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        equal="state",
    )
    return dataclasses.replace(config, **kind.fields)


def largest_factor(variant: Variant) -> float:
    """Upper end of MDN's initial factors, where the variant has any."""
    return _KINDS[variant].largest_factor
