"""Models of every mixer with an equal state or an equal number of parameters."""

import functools
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.models import AttentionConfig, Mixer

Equal = Literal["state", "parameters"]

SHOWN: dict[Mixer, str] = {
    "mdn": "MDN",
    "gdn": "GDN",
    "kda": "KDA",
    "comba": "Comba",
    "gdn2": "GDN-2",
    "mamba2": "Mamba-2",
    "mamba3": "Mamba-3",
    "titans": "Titans (matrix)",
    "attention": "Transformer",
}
"""Names of the mixers in tables."""


ATTENTION_WIDTH = 64
"""Of a head of softmax attention at least: four of 16 did not learn what one of 64 did."""


class Size(NamedTuple):
    """Size of a model.

    Attributes:
      parameters: all of them.
      state: numbers that a row needs to go on, without convolutions; None where it grows.
    """

    parameters: int
    state: int | None


def model_config(
    mixer: Mixer,
    *,
    vocab_size: int,
    hidden_size: int,
    layers: int,
    heads: int,
    equal: Equal,
    attention_every: int | None = None,
) -> MDNConfig:
    """The model of a mixer beside that of MDN with `heads` heads as wide together as the model.

    With an equal state, the value heads of MDN and Titans, which have two memories, are as wide as
    their key heads, those of the others twice as wide. With equal parameters, all have the
    published shapes: value heads twice as wide as key heads (Titans has none published), but for
    KDA and GDN-2. In both, the width of the MLP makes up for what the mixers differ in. Mamba-3 has
    the heads of Mamba-2; beside a state equal to that of the others it has its last key and value,
    3 / (width of a key head) as much. Softmax attention keeps all tokens, so that its state is
    never equal; its heads are at least `ATTENTION_WIDTH` wide, if the model is.

    Args:
      mixer: which.
      vocab_size: kinds of tokens.
      hidden_size: width, a multiple of `heads`.
      layers: number of layers.
      heads: key heads; Mamba-2 and Mamba-3 have heads of twice the width together, of half a key
        head's each, softmax attention as many fewer as its width takes.
      equal: what is.
      attention_every: softmax attention in the last of so many layers, as of a hybrid; None: none
        beside the mixer.
    """
    if hidden_size % (2 * heads):
        raise ValueError(
            f"heads: expected a divisor of half of hidden_size = {hidden_size}, got {heads}"
        )
    width = hidden_size // heads
    narrow = ("mdn", "titans") if equal == "state" else ("kda", "gdn2")

    few = heads
    while hidden_size // few < ATTENTION_WIDTH and few % 2 == 0:
        few //= 2

    def make(mixer: Mixer, mlp: int, every: int | None = None) -> MDNConfig:
        expand = 1.0 if mixer in narrow else 2.0
        shape = {"num_heads": heads, "head_dim": width, "expand_v": expand}
        if mixer in ("mamba2", "mamba3"):
            shape = {"num_heads": 1, "num_v_heads": 4 * heads, "head_dim": width, "expand_v": 0.5}
        if mixer == "attention":
            shape |= {"num_heads": few, "head_dim": hidden_size // few}
        return MDNConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            mixer=mixer,
            use_lora_gate=mixer in ("kda", "gdn2"),
            conv_bias=mixer == "mamba2",
            intermediate_size=mlp,
            tie_word_embeddings=True,
            attn=AttentionConfig(tuple(range(every - 1, layers, every)), few) if every else None,
            **shape,  # type: ignore[arg-type]
        )

    largest: Mixer = "gdn" if equal == "state" else "mdn"
    target = model_size(make(largest, 2 * hidden_size)).parameters
    plain = (
        model_size(make(mixer, 0, attention_every)).parameters + layers * hidden_size
    )  # the norm of the MLP
    mlp = round((target - plain) / (3 * layers * hidden_size))
    return make(mixer, max(1, mlp), attention_every)


@functools.cache
def model_size(config: MDNConfig) -> Size:
    """Counts without making the arrays."""
    model, cache = nnx.eval_shape(lambda: _model_and_cache(config))
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    if "attention" in config.mixers:
        return Size(parameters, None)
    return Size(parameters, sum(x.size for x in jax.tree.leaves([c.state for c in cache])))


def _model_and_cache(config: MDNConfig) -> tuple[MDNForCausalLM, tuple[Any, ...]]:
    model = MDNForCausalLM(config, rngs=nnx.Rngs(0))
    return model, model.init_cache(1)
