"""Configuration of the model, with the field names of the published JSON files."""

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Softmax attention in some layers of a hybrid model (`attn` in the published JSON).

    Attributes:
      layers: indices of the layers that use softmax attention instead of MDN.
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
        fits = isinstance(self.layers, tuple) and all(_is_int(n, 0) for n in self.layers)
        _require("attn.layers", self.layers, "a tuple of layer indices >= 0", fits)
        _require("attn.num_heads", self.num_heads, "an int >= 1", _is_int(self.num_heads, 1))
        kv = self.num_kv_heads
        fits = kv is None or (_is_int(kv, 1) and self.num_heads % kv == 0)
        _require(
            "attn.num_kv_heads", kv, f"a divisor of num_heads = {self.num_heads} or None", fits
        )
        _require("attn.qkv_bias", self.qkv_bias, "a bool", isinstance(self.qkv_bias, bool))
        fits = self.window_size is None or _is_int(self.window_size, 1)
        _require("attn.window_size", self.window_size, "an int >= 1 or None", fits)
        _require("attn.rope_theta", self.rope_theta, "a number > 0", _is_positive(self.rope_theta))


@dataclasses.dataclass(frozen=True)
class MDNConfig:
    """Momentum DeltaNet language model (MDN, arXiv 2605.05838).

    The defaults are the published 1.3B shape with the published defaults of everything else.

    Attributes:
      vocab_size: tokens in the vocabulary.
      hidden_size: width of the residual stream.
      num_hidden_layers: blocks, each a mixer and an MLP.
      num_heads: query and key heads of an MDN layer.
      num_v_heads: value heads, a multiple of `num_heads`; None means `num_heads`.
      head_dim: width of a query or key head.
      expand_v: width of a value head over `head_dim`; the product is an integer.
      use_short_conv: causal depthwise convolutions after the q, k, v projections.
      conv_size: taps of these convolutions, the current token included.
      conv_bias: biases in these convolutions.
      use_gate: multiply the normalised output of every head by `sigmoid(g_proj x)`.
      use_lora_gate: make `g_proj` two projections through `lora_gate_rank`.
      lora_gate_rank: None means the width of a value head.
      use_output_correction: query minus `exp(D_log)` times the key, before normalisation.
      use_p_times_alpha: erase with `alpha` times the normalised key; otherwise with the
        normalised key.
      min_log_mu: lower bound of the log momentum (nats); None means no bound.
      tau_factor: `e_proj x` is divided by `sqrt(hidden_size / tau_factor)`.
      hidden_ratio: width of the MLP over `hidden_size`, before the rule of `mlp_width`; None
        means 4.
      intermediate_size: width of the MLP; None means by `hidden_ratio`.
      norm_eps: epsilon of every RMS norm.
      tie_word_embeddings: the output projection is the embedding.
      initializer_range: standard deviation of linear, convolution and embedding weights.
      attn: softmax attention in some layers; None means MDN in all of them.
      extras: published keys without a meaning here, each with its JSON text, kept for `to_dict`.
    """

    vocab_size: int = 50257
    hidden_size: int = 2048
    num_hidden_layers: int = 21
    num_heads: int = 6
    num_v_heads: int | None = None
    head_dim: int = 256
    expand_v: float = 2.0
    use_short_conv: bool = True
    conv_size: int = 4
    conv_bias: bool = False
    use_gate: bool = True
    use_lora_gate: bool = False
    lora_gate_rank: int | None = None
    use_output_correction: bool = True
    use_p_times_alpha: bool = True
    min_log_mu: float | None = -2.0
    tau_factor: float = 1.0
    hidden_ratio: float | None = 4.0
    intermediate_size: int | None = None
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    attn: AttentionConfig | None = None
    extras: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_heads", "head_dim", "conv_size"):
            _require(name, getattr(self, name), "an int >= 1", _is_int(getattr(self, name), 1))
        layers = self.num_hidden_layers
        _require("num_hidden_layers", layers, "an int >= 1", _is_int(layers, 1))
        for name in ("num_v_heads", "lora_gate_rank", "intermediate_size"):
            value = getattr(self, name)
            _require(name, value, "an int >= 1 or None", value is None or _is_int(value, 1))
        for field in dataclasses.fields(self):
            if field.type is bool:
                value = getattr(self, field.name)
                _require(field.name, value, "a bool", isinstance(value, bool))
        for name in ("expand_v", "tau_factor", "norm_eps", "initializer_range"):
            _require(name, getattr(self, name), "a number > 0", _is_positive(getattr(self, name)))
        ratio = self.hidden_ratio
        _require(
            "hidden_ratio", ratio, "a number > 0 or None", ratio is None or _is_positive(ratio)
        )
        bound = self.min_log_mu
        fits = bound is None or (_is_number(bound) and bound <= 0)
        _require("min_log_mu", bound, "a number <= 0 or None", fits)
        fits = self.value_heads % self.num_heads == 0
        _require(
            "num_v_heads", self.num_v_heads, f"a multiple of num_heads = {self.num_heads}", fits
        )
        width = self.head_dim * self.expand_v
        fits = self.head_v_dim >= 1 and math.isclose(width, self.head_v_dim, rel_tol=1e-5)
        expected = f"head_dim * expand_v an integer >= 1 (head_dim = {self.head_dim})"
        _require("expand_v", self.expand_v, expected, fits)
        if self.attn is not None:
            self._check_attention(self.attn)

    def _check_attention(self, attn: AttentionConfig) -> None:
        fits = isinstance(attn, AttentionConfig)
        _require("attn", attn, "an AttentionConfig or None", fits)
        expected = f"indices below num_hidden_layers = {self.num_hidden_layers}"
        fits = all(layer < self.num_hidden_layers for layer in attn.layers)
        _require("attn.layers", attn.layers, expected, fits)
        fits = self.hidden_size % (2 * attn.num_heads) == 0
        expected = f"heads of an even width (hidden_size = {self.hidden_size})"
        _require("attn.num_heads", attn.num_heads, expected, fits)

    @property
    def value_heads(self) -> int:
        """`HV`: value heads; the per-head parameters have this size."""
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def head_v_dim(self) -> int:
        """`V`: width of a value head."""
        return round(self.head_dim * self.expand_v)

    @property
    def key_dim(self) -> int:
        """Width of the query and of the key projection, `H * K`."""
        return self.num_heads * self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of the value projection, `HV * V`."""
        return self.value_heads * self.head_v_dim

    @property
    def gate_rank(self) -> int:
        """Width between the two projections of the LoRA gate."""
        return self.head_v_dim if self.lora_gate_rank is None else self.lora_gate_rank

    @property
    def mlp_width(self) -> int:
        """`intermediate_size`, or two thirds of the ratio rounded up to a multiple of 256."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        ratio = 4 if self.hidden_ratio is None else self.hidden_ratio
        return 256 * math.ceil(int(self.hidden_size * ratio * 2 / 3) / 256)

    def is_attention(self, layer: int) -> bool:
        """Whether layer `layer` uses softmax attention."""
        return self.attn is not None and layer in self.attn.layers

    @classmethod
    def from_dict(cls, published: Mapping[str, Any]) -> "MDNConfig":
        """Reads a published JSON configuration; missing keys take the defaults of this class.

        Args:
          published: the JSON object. Keys without a meaning here are accepted if their value
            changes nothing that is computed, and kept for `to_dict`.

        Raises:
          ValueError: an unknown key, or a value that this implementation does not honour.
        """
        fields = {f.name for f in dataclasses.fields(cls)} - {"extras"}
        known: dict[str, Any] = {}
        extras: dict[str, str] = {}
        for key, value in published.items():
            if key in fields:
                known[key] = value
            elif key in _WITHOUT_MEANING:
                expected, honoured = _WITHOUT_MEANING[key]
                _require(key, value, expected, honoured(value))
                extras[key] = json.dumps(value)
            else:
                raise _unknown(key, "", fields | _WITHOUT_MEANING.keys())
        if isinstance(known.get("attn"), Mapping):
            known["attn"] = _attention_from_dict(known["attn"])
        return cls(**known, extras=tuple(sorted(extras.items())))

    def to_dict(self) -> dict[str, Any]:
        """The way back: every field under its published name, and the kept keys as they were."""
        published = dataclasses.asdict(self)
        del published["extras"]
        if self.attn is not None:
            published["attn"]["layers"] = list(self.attn.layers)
        return published | {key: json.loads(text) for key, text in self.extras}


def _attention_from_dict(published: Mapping[str, Any]) -> AttentionConfig:
    fields = {f.name for f in dataclasses.fields(AttentionConfig)}
    for key in published:
        if key not in fields:
            raise _unknown(key, "attn.", fields)
    for key in ("layers", "num_heads"):
        _require(f"attn.{key}", None, "a value", key in published)
    layers = published["layers"]
    return AttentionConfig(
        **{**published, "layers": tuple(layers) if isinstance(layers, list) else layers}
    )


def _unknown(key: str, prefix: str, known: set[str]) -> ValueError:
    close = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
    return ValueError(f"{prefix}{key}: unknown key; the closest known one is {prefix}{close[0]}")


def _require(name: str, value: object, expected: str, fits: bool) -> None:
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _one_of(*values: object) -> tuple[str, Callable[[object], bool]]:
    expected = " or ".join(repr(value) for value in values)
    return expected, lambda value: any(value is v or value == v for v in values)


def _of_type(expected: str, *types: type) -> tuple[str, Callable[[object], bool]]:
    return expected, lambda value: isinstance(value, types)


_BOOL = _of_type("a bool", bool)
_TOKEN = _of_type("a token id or None", int, type(None))
_TEXT = _of_type("a string or None", str, type(None))

# Published keys that change nothing that is computed here, with the values for which that holds.
_WITHOUT_MEANING: dict[str, tuple[str, Callable[[object], bool]]] = {
    "_name_or_path": _TEXT,
    "allow_neg_eigval": _one_of(False),
    "architectures": _of_type("a list or None", list, tuple, type(None)),
    "attn_mode": _one_of("chunk", "fused_recurrent"),
    "bos_token_id": _TOKEN,
    "dtype": _TEXT,
    "eos_token_id": _TOKEN,
    "fuse_cross_entropy": _BOOL,
    "fuse_linear_cross_entropy": _BOOL,
    "fuse_norm": _BOOL,
    "fuse_swiglu": _BOOL,
    "hidden_act": _one_of("swish", "silu"),
    "layer_idx": _of_type("an int or None", int, type(None)),
    "max_position_embeddings": _of_type("an int or None", int, type(None)),
    "mode": _one_of("chunk", "fused_recurrent"),
    "model_type": _one_of("momentum_deltanet"),
    "pad_token_id": _TOKEN,
    "torch_dtype": _TEXT,
    "transformers_version": _TEXT,
    "use_cache": _BOOL,
    "use_l2warp": _one_of(False),
}
