"""Options of softmax attention."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mdn_jax.models.fields import NUMBER, is_int, is_positive, require, require_size, unknown


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Softmax attention in some layers of a hybrid model (`attn` in the published JSON).

    Attributes:
      layers: indices of the layers that use softmax attention instead of `mixer`; with
        `mixer` or `other_mixer` "attention" they may be none.
      num_heads: query heads; the head width is `hidden_size / num_heads`.
      num_kv_heads: key and value heads, a divisor of `num_heads`; None means `num_heads`.
      qkv_bias: biases in the query, key and value projections.
      window_size: a token sees itself and the `window_size - 1` tokens before it; None: all.
      rope_theta: base of the rotary embedding.
    """

    layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    window_size: int | None = None
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        fits = isinstance(self.layers, tuple) and all(is_int(n, 0) for n in self.layers)
        require("attn.layers", self.layers, "a tuple of layer indices >= 0", fits)
        require_size("attn.num_heads", self.num_heads)
        kv = self.num_kv_heads
        fits = kv is None or (is_int(kv, 1) and self.num_heads % kv == 0)
        require("attn.num_kv_heads", kv, f"a divisor of num_heads = {self.num_heads} or None", fits)
        require("attn.qkv_bias", self.qkv_bias, "a bool", isinstance(self.qkv_bias, bool))
        require_size("attn.window_size", self.window_size, or_none=True)
        expected = f"a number > 0 {NUMBER}"
        require("attn.rope_theta", self.rope_theta, expected, is_positive(self.rope_theta))


def attention_from_dict(published: Mapping[str, Any]) -> AttentionConfig:
    """Reads the `attn` of a published JSON configuration."""
    fields = {f.name for f in dataclasses.fields(AttentionConfig)}
    for key in published:
        if key not in fields:
            raise unknown(key, "attn.", fields)
    for key in ("layers", "num_heads"):
        require(f"attn.{key}", None, "a value", key in published)
    layers = published["layers"]
    return AttentionConfig(
        **{**published, "layers": tuple(layers) if isinstance(layers, list) else layers}
    )
