"""How far two results are apart, and how far they may be."""

from typing import NamedTuple

import jax
import numpy as np


class Limits(NamedTuple):
    """Largest relative errors (Frobenius norm) of what counts as right.

    Attributes:
      outputs: of outputs and final states.
      gradients: of gradients.
      states: of final states, where these may differ less than outputs; None: as `outputs`.
      gates: of gradients of gates and entering states, which are float32 also for 16-bit inputs;
        None: as `gradients`.
      same: between two ways to the same numbers: other pieces, another order of rows and heads.
    """

    outputs: float
    gradients: float
    states: float | None = None
    gates: float | None = None
    same: float = 1e-5

    def of(self, name: str) -> float:
        """The limit for one result: "o", "s", "m", or "d" and the name of an argument."""
        if name == "o":
            return self.outputs
        if name in ("s", "m"):
            return self.outputs if self.states is None else self.states
        narrow = name in ("d_q", "d_k", "d_v", "d_p") or self.gates is None
        return self.gradients if narrow or self.gates is None else self.gates


LIMITS = {
    "float64": Limits(1e-10, 1e-10, same=1e-11),
    "float32": Limits(1e-4, 5e-4, same=1e-4),
    "bfloat16": Limits(5e-3, 1e-2, same=1e-2),
    "float16": Limits(5e-3, 1e-2, same=1e-2),
}
"""By dtype of q, k, v."""


def relative_error(actual: object, expected: object) -> float:
    """`|actual - expected| / |expected|` in Frobenius norm, float64; inf where anything is nan."""
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"actual: expected shape {list(b.shape)}, got {list(a.shape)}")
    scale = float(np.linalg.norm(b))
    error = float(np.linalg.norm(a - b))
    if not np.isfinite(error):
        return float("inf")
    return error / scale if scale > 0 else (0.0 if error == 0 else float("inf"))


def relative_errors(actual: object, expected: object) -> dict[str, float]:
    """`relative_error` of every leaf of two pytrees of one structure, by path."""
    flat = jax.tree_util.tree_leaves_with_path(expected)
    leaves = jax.tree.leaves(actual)
    if len(leaves) != len(flat):
        raise ValueError(f"actual: expected {len(flat)} leaves, got {len(leaves)}")
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): relative_error(x, y)
        for (path, y), x in zip(flat, leaves, strict=True)
    }
