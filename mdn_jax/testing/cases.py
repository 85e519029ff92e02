"""One call of the operator, described by a few words and numbers."""

from dataclasses import dataclass
from typing import Any

from mdn_jax.testing.inputs import random_inputs


@dataclass(frozen=True)
class Case:
    """One call of the operator.

    Attributes:
      key_dim: K.
      value_dim: V.
      dtype: of q, k, v.
      explicit_p: with an erase key of its own.
      regime: gates, one of `GATE_REGIMES`, or several, one a row.
      length: T.
      heads: H.
      groups: value heads a key head.
      documents: packed documents a row.
      keys: "random", "parallel" or "zero", or several, one a row.
      initial_state: with a random entering state.
      rows: of the batch, B.
      backward: whether gradients are asked for.
    """

    key_dim: int
    value_dim: int
    dtype: str
    explicit_p: bool = False
    regime: str | tuple[str, ...] = "layer"
    length: int = 130
    heads: int = 1
    groups: int = 1
    documents: int = 1
    keys: str | tuple[str, ...] = "random"
    initial_state: bool = True
    rows: int = 1
    backward: bool = True

    @property
    def name(self) -> str:
        """Everything that is not the default, readable."""
        parts = [f"K{self.key_dim}", f"V{self.value_dim}", self.dtype]
        parts += ["p"] * self.explicit_p + [_joined(self.regime), f"T{self.length}"]
        parts += [f"H{self.heads}"] * (self.heads > 1)
        parts += [f"groups{self.groups}"] * (self.groups > 1)
        parts += [f"documents{self.documents}"] * (self.documents > 1)
        parts += [f"{_joined(self.keys)}-keys"] * (self.keys != "random")
        parts += ["no-state"] * (not self.initial_state)
        parts += [f"B{self.rows}"] * (self.rows > 1)
        parts += ["forward"] * (not self.backward)
        return "_".join(parts)

    @property
    def value_heads(self) -> int:
        """Of all rows, `B * HV`."""
        return self.rows * self.heads * self.groups

    def inputs(self, seed: int = 0) -> dict[str, Any]:
        """Arguments of `momentum_delta_rule`."""
        return random_inputs(
            seed=seed,
            batch=self.rows,
            length=self.length,
            heads=self.heads,
            value_heads=self.heads * self.groups,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            regime=self.regime,
            keys=self.keys,
            dtype=self.dtype,
            explicit_p=self.explicit_p,
            initial_state=self.initial_state,
            documents=self.documents,
        )


def _joined(names: str | tuple[str, ...]) -> str:
    return names if isinstance(names, str) else "+".join(names)
