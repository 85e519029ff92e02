"""Starts MDN with small factors: it forgets slowly from the first step."""

import math
from typing import Any

import jax

PUBLISHED_FACTOR = 4.0
"""MDN's factors start uniform in (0, 4)."""

SLOW_FACTOR = 0.4
"""Uniform up to this, `log_alpha` starts near 0: memories last for hundreds of tokens."""


def with_largest_factor(params: Any, largest: float) -> Any:
    """The initial parameters with MDN's factors `f` uniform in (0, `largest`).

    `theta = arctan(eta f)` and `alpha <= cos^2(theta)`: a small factor remembers long.

    Args:
      params: a pure dict of a model as it is initialised; one without MDN stays as it is.
      largest: upper end of the factors.
    """
    change = math.log(largest / PUBLISHED_FACTOR)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x + change if path[-1].key == "log_factor" else x, params
    )
