"""Stability of the momentum recurrence as a second-order system (docs/stability.md)."""

from mdn_jax.analysis.layers import LayerRecord, record_layers, state_norms
from mdn_jax.analysis.second_order import (
    complex_region,
    damping_ratio,
    eigenvalues,
    half_life,
    is_oscillating,
    orthogonal_transition,
    period,
    spectral_radius,
    transition,
)
from mdn_jax.analysis.stability import (
    PublishedBounds,
    is_stable,
    published_bounds,
    stability_load,
)
from mdn_jax.analysis.windows import (
    impulse_response,
    spectral_norm,
    window_growth,
    window_products,
)

__all__ = [
    "LayerRecord",
    "PublishedBounds",
    "complex_region",
    "damping_ratio",
    "eigenvalues",
    "half_life",
    "impulse_response",
    "is_oscillating",
    "is_stable",
    "orthogonal_transition",
    "period",
    "published_bounds",
    "record_layers",
    "spectral_norm",
    "spectral_radius",
    "stability_load",
    "state_norms",
    "transition",
    "window_growth",
    "window_products",
]
