"""Published checkpoints and configurations, both ways."""

from mdn_jax.interop.official import (
    layer_from_official,
    model_from_official,
    official_state_dict,
)

__all__ = ["layer_from_official", "model_from_official", "official_state_dict"]
