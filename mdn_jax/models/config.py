"""Configuration of the model, with the field names of the published JSON files."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from mdn_jax.models.attention_config import AttentionConfig, attention_from_dict
from mdn_jax.models.fields import (
    MAX_SIZE,
    NUMBER,
    WITHOUT_MEANING,
    is_int,
    is_number,
    is_positive,
    require,
    require_size,
    unknown,
)

MAX_LAYERS = 1_000
"""Most layers of a model: each is traced and held apart."""

Mixer = Literal["mdn", "gdn", "kda", "comba", "gdn2", "mamba2", "mamba3", "titans", "attention"]
"""Token mixer of a layer: Momentum DeltaNet, Gated DeltaNet, Kimi Delta Attention, Comba, Gated
DeltaNet-2, Mamba-2, Mamba-3, the memory of Titans or softmax attention."""

Bound = Literal["published", "stable", "alpha", "beta", "none"]
"""Of MDN's decay and step size: both published bounds, the region of stability in their place, one
of the published bounds or none (ablations)."""


@dataclasses.dataclass(frozen=True)
class MDNConfig:
    """Momentum DeltaNet language model (MDN, arXiv 2605.05838).

    The defaults are the published 1.3B shape with the published defaults of everything else.

    Attributes:
      vocab_size: tokens in the vocabulary.
      hidden_size: width of the residual stream.
      num_hidden_layers: blocks, each a mixer and an MLP.
      mixer: token mixer of every layer that no other field gives to another one.
      other_mixer: token mixer of the layers in `other_layers`.
      other_layers: indices of the layers with `other_mixer`.
      num_heads: query and key heads of a layer; of Mamba-2 and Mamba-3 the groups.
      num_v_heads: value heads, a multiple of `num_heads`; None means `num_heads`.
      head_dim: width of a query or key head; of Mamba-2 and Mamba-3 the size of the state.
      expand_v: width of a value head over `head_dim`; the product is an integer.
      use_short_conv: causal depthwise convolutions after the q, k, v projections; Mamba-3 has none.
      conv_size: taps of these convolutions, the current token included.
      conv_bias: biases in these convolutions.
      use_gate: multiply the normalised output of every head by `sigmoid(g_proj x)`.
      use_lora_gate: make `g_proj` two projections through `lora_gate_rank`.
      lora_gate_rank: None means the width of a value head.
      use_output_correction: query minus `exp(D_log)` times the key, before normalisation (Comba:
        minus `d` times the erase key).
      use_p_times_alpha: erase with `alpha` times the normalised key; otherwise with the
        normalised key.
      min_log_mu: lower bound of the log momentum (nats); None means no bound.
      tau_factor: `e_proj x` is divided by `sqrt(hidden_size / tau_factor)`.
      use_momentum: False: MDN with a momentum of zero and without its parameters, an ablation.
      bound: of MDN's decay and step size: "published", `cos^2(theta)` and `sin^2(theta)`; "stable",
        both are free within the region of stability (`docs/stability.md`, section 8); "alpha" or
        "beta", the published bound of one of them; "none". The last three are ablations.
      allow_neg_eigval: GDN's step size in (0, 2), in place of (0, 1).
      hidden_ratio: width of the MLP over `hidden_size`, before the rule of `mlp_width`; None
        means 4.
      intermediate_size: width of the MLP; None means by `hidden_ratio`, 0 no MLP (the published
        Mamba-2).
      norm_eps: epsilon of every RMS norm.
      tie_word_embeddings: the output projection is the embedding.
      initializer_range: standard deviation of linear, convolution and embedding weights.
      attn: softmax attention in some layers, and its options wherever it is; None means none of
        its own, and for "attention" in `mixer` or `other_mixer` `num_heads` heads.
      extras: published keys without a meaning here, each with its JSON text, kept for `to_dict`.
    """

    vocab_size: int = 50257
    hidden_size: int = 2048
    num_hidden_layers: int = 21
    mixer: Mixer = "mdn"
    other_mixer: Mixer | None = None
    other_layers: tuple[int, ...] = ()
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
    use_momentum: bool = True
    bound: Bound = "published"
    allow_neg_eigval: bool = False
    hidden_ratio: float | None = 4.0
    intermediate_size: int | None = None
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    attn: AttentionConfig | None = None
    extras: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_heads", "head_dim", "conv_size"):
            require_size(name, getattr(self, name))
        require_size("num_hidden_layers", self.num_hidden_layers, most=MAX_LAYERS)
        for name, least in (("num_v_heads", 1), ("lora_gate_rank", 1), ("intermediate_size", 0)):
            require_size(name, getattr(self, name), least, or_none=True)
        for field in dataclasses.fields(self):
            if field.type is bool:
                value = getattr(self, field.name)
                require(field.name, value, "a bool", isinstance(value, bool))
        for name in ("expand_v", "tau_factor", "norm_eps", "initializer_range"):
            value = getattr(self, name)
            require(name, value, f"a number > 0 {NUMBER}", is_positive(value))
        ratio = self.hidden_ratio
        fits = ratio is None or is_positive(ratio)
        require("hidden_ratio", ratio, f"a number > 0 {NUMBER}, or None", fits)
        bound = self.min_log_mu
        fits = bound is None or (is_number(bound) and bound <= 0)
        require("min_log_mu", bound, f"a number <= 0 {NUMBER}, or None", fits)
        fits = self.value_heads % self.num_heads == 0
        require(
            "num_v_heads", self.num_v_heads, f"a multiple of num_heads = {self.num_heads}", fits
        )
        width = self.head_dim * self.expand_v
        fits = self.head_v_dim >= 1 and math.isclose(width, self.head_v_dim, rel_tol=1e-5)
        expected = f"head_dim * expand_v an integer >= 1 (head_dim = {self.head_dim})"
        require("expand_v", self.expand_v, expected, fits)
        self._check_widths()
        if self.attn is not None:
            self._check_attention(self.attn)
        self._check_mixers()

    def _check_widths(self) -> None:
        """Of the sizes that follow from several fields."""
        most = f"a width of at most {MAX_SIZE}"
        widths = (
            ("num_heads", "num_heads * head_dim", self.key_dim),
            ("expand_v", "value heads * head_dim * expand_v", self.value_dim),
        )
        for name, of, width in widths:
            require(name, getattr(self, name), f"{of} {most}", width <= MAX_SIZE)
        if self.intermediate_size is None:
            fits = 1 <= self.mlp_width <= MAX_SIZE
            expected = f"an MLP with {most}, and at least 1 (hidden_size = {self.hidden_size})"
            require("hidden_ratio", self.hidden_ratio, expected, fits)

    def _check_attention(self, attn: AttentionConfig) -> None:
        fits = isinstance(attn, AttentionConfig)
        require("attn", attn, "an AttentionConfig or None", fits)
        expected = f"indices below num_hidden_layers = {self.num_hidden_layers}"
        fits = all(layer < self.num_hidden_layers for layer in attn.layers)
        require("attn.layers", attn.layers, expected, fits)
        fits = self.hidden_size % (2 * attn.num_heads) == 0
        expected = f"heads of an even width (hidden_size = {self.hidden_size})"
        require("attn.num_heads", attn.num_heads, expected, fits)

    def _check_mixers(self) -> None:
        kinds = get_args(Mixer)
        expected = f"one of {', '.join(kinds)}"
        require("mixer", self.mixer, expected, self.mixer in kinds)
        other = self.other_mixer
        require("other_mixer", other, f"{expected} or None", other is None or other in kinds)
        layers, count = self.other_layers, self.num_hidden_layers
        fits = isinstance(layers, tuple) and all(is_int(n, 0) and n < count for n in layers)
        expected = f"a tuple of layer indices from 0 to {count - 1}"
        require("other_layers", layers, expected, fits)
        if (other is None) != (not layers):
            require("other_layers", layers, "layers if there is an other_mixer, else none", False)
        attention = () if self.attn is None else self.attn.layers
        expected = f"none of attn.layers = {attention}"
        require("other_layers", layers, expected, not set(layers) & set(attention))
        bounds = get_args(Bound)
        require("bound", self.bound, f"one of {', '.join(bounds)}", self.bound in bounds)
        mixers = self.mixers
        fits = not self.allow_neg_eigval or "gdn" in mixers
        require("allow_neg_eigval", self.allow_neg_eigval, "False without mixer gdn", fits)
        for kind in ("kda", "gdn2"):
            fits = kind not in mixers or self.value_heads == self.num_heads
            require("num_v_heads", self.num_v_heads, f"num_heads or None with mixer {kind}", fits)
        fits = "mamba3" not in mixers or self.head_dim >= 4
        require("head_dim", self.head_dim, "at least 4 with mixer mamba3, half of it turns", fits)
        if "attention" in mixers and self.attn is None:
            fits = self.hidden_size % (2 * self.num_heads) == 0
            expected = f"heads of an even width (hidden_size = {self.hidden_size}, mixer attention)"
            require("num_heads", self.num_heads, expected, fits)

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """The token mixer of every layer."""
        return tuple(map(self.mixer_of, range(self.num_hidden_layers)))

    def mixer_of(self, layer: int) -> Mixer:
        """The token mixer of layer `layer`."""
        if self.attn is not None and layer in self.attn.layers:
            return "attention"
        if self.other_mixer is not None and layer in self.other_layers:
            return self.other_mixer
        return self.mixer

    @property
    def attention(self) -> AttentionConfig:
        """Options of softmax attention, wherever it is."""
        return self.attn or AttentionConfig(layers=(), num_heads=self.num_heads)

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
        return self.mixer_of(layer) == "attention"

    @classmethod
    def from_dict(cls, published: Mapping[str, Any]) -> "MDNConfig":
        """Reads a published JSON configuration; missing keys take the defaults of this class.

        Args:
          published: the JSON object. Keys without a meaning here are accepted if their value
            changes nothing that is computed, and kept for `to_dict`.

        Raises:
          ValueError: an unknown key, or a value that this implementation does not honour.
        """
        require("config", published, "a JSON object", isinstance(published, Mapping))
        published = with_present_names(published)
        fields = {f.name for f in dataclasses.fields(cls)} - {"extras"}
        known: dict[str, Any] = {}
        extras: dict[str, str] = {}
        for key, value in published.items():
            if key in fields:
                known[key] = value
            elif key in WITHOUT_MEANING:
                expected, honoured = WITHOUT_MEANING[key]
                require(key, value, expected, honoured(value))
                try:
                    extras[key] = json.dumps(value)
                except RecursionError:
                    raise ValueError(f"{key}: expected {expected}, got one too deep") from None
            else:
                raise unknown(key, "", fields | WITHOUT_MEANING.keys())
        if isinstance(known.get("attn"), Mapping):
            known["attn"] = attention_from_dict(known["attn"])
        if isinstance(known.get("other_layers"), list):
            known["other_layers"] = tuple(known["other_layers"])
        return cls(**known, extras=tuple(sorted(extras.items())))

    def to_dict(self) -> dict[str, Any]:
        """The way back: every field under its published name, and the kept keys as they were.

        Fields that the published configurations do not have are there only if they say something.
        """
        published = dataclasses.asdict(self)
        del published["extras"]
        for name, default in NOT_PUBLISHED.items():
            if published[name] == default:
                del published[name]
        if self.other_layers:
            published["other_layers"] = list(self.other_layers)
        if self.attn is not None:
            published["attn"]["layers"] = list(self.attn.layers)
        return published | {key: json.loads(text) for key, text in self.extras}


NOT_PUBLISHED: dict[str, object] = {
    "mixer": "mdn",
    "other_mixer": None,
    "other_layers": (),
    "use_momentum": True,
    "bound": "published",
    "allow_neg_eigval": False,
}
"""Fields that the published configurations do not have, with the values that they have there."""


def with_present_names(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved configuration with `bound` in place of the two flags that there were before it.

    Raises:
      ValueError: flags that are no bools, or beside `bound`.
    """
    flags = [name for name in ("bound_alpha", "bound_beta") if name in saved]
    if not flags:
        return saved
    for name in flags:
        require(name, saved[name], "a bool", isinstance(saved[name], bool))
    require(flags[0], saved[flags[0]], "no such flag beside bound", "bound" not in saved)
    alpha, beta = saved.get("bound_alpha", True), saved.get("bound_beta", True)
    bound = ("published" if beta else "alpha") if alpha else ("beta" if beta else "none")
    return {key: x for key, x in saved.items() if key not in flags} | {"bound": bound}
