"""The model of the experiment: a gated short convolution, then the mixer under test.

    h = dropout(embeddings[tokens])
    h = h + mixer(layer_norm(h));   h = h + layer_norm(h)        twice
    logits = layer_norm(h) embeddings^T

The second line's second half is Zoology's block without an MLP: its place is taken by the identity,
so that the normalised values themselves are added.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from benchmarks.initial_factors import PUBLISHED_FACTOR, SLOW_FACTOR, with_largest_factor
from mdn_jax import MDNConfig
from mdn_jax.layers import SoftmaxAttention
from mdn_jax.models import Mixer
from mdn_jax.models.causal_lm import STATE_MIXERS
from mdn_jax.ops.api import Implementation

Variant = Literal[
    "attention",
    "gdn",
    "kda",
    "comba",
    "gdn2",
    "mamba2",
    "mamba3",
    "titans",
    "mdn",
    "mdn_slow",
    "mdn_uncorrected",
    "mdn_slow_uncorrected",
]
"""Mixers under test; MDN as published, slow to forget at first, and without output correction."""

Equal = Literal["width", "state"]

HEADS = 2
LAYERS = 2
TAPS = 3
DROPOUT = 0.1
_STD = 0.02
_MAMBA: tuple[Mixer, ...] = ("mamba2", "mamba3")
_NORM_EPSILON = 1e-5


class Shape(NamedTuple):
    """A model.

    Attributes:
      variant: the mixer of its second block.
      width: of the residual stream; both key heads together are as wide.
      value_width: of all value heads together, over `width`.
      vocabulary: kinds of tokens.
    """

    variant: Variant
    width: int
    value_width: float
    vocabulary: int

    @property
    def mixer(self) -> Mixer:
        """The layer."""
        return "mdn" if self.variant.startswith("mdn") else self.variant  # type: ignore[return-value]

    @property
    def largest_factor(self) -> float:
        """Upper end of MDN's initial factors."""
        return SLOW_FACTOR if "slow" in self.variant else PUBLISHED_FACTOR


def model_shape(variant: Variant, width: int, equal: Equal, vocabulary: int) -> Shape:
    """The model of a mixer beside Gated DeltaNet's of the same width.

    With equal widths all have their published shapes: values twice as wide as keys, but for KDA,
    Gated DeltaNet-2 and softmax attention (as wide). With equal states MDN and Titans, which have
    two memories, have values half as wide, and KDA and Gated DeltaNet-2 twice as wide. Mamba-2 has
    one group, whose state is as wide as a key head of the others, and heads of half that width; its
    state is Gated DeltaNet's. Mamba-3 is as Mamba-2, with its last key and value beside that state.

    Args:
      variant: the mixer.
      width: a multiple of 8, so that heads of Mamba-2 are integers and those of attention even.
      equal: what is.
      vocabulary: kinds of tokens.

    Raises:
      ValueError: a width that does not fit.
    """
    if width < 8 or width % 8:
        raise ValueError(f"width: expected a multiple of 8, got {width!r}")
    narrow = variant == "attention" or (
        variant in ("kda", "gdn2") if equal == "width" else _two_memories(variant)
    )
    return Shape(variant, width, 1.0 if narrow else 2.0, vocabulary)


def _two_memories(variant: Variant) -> bool:
    return variant == "titans" or variant.startswith("mdn")


def state_entries(shape: Shape, length: int) -> int:
    """Numbers that the second block keeps of a row of `length` tokens, without convolutions."""
    if shape.variant == "attention":
        return 2 * shape.width * length
    memories = 2 if _two_memories(shape.variant) else 1
    entries = round(memories * shape.width * shape.value_width * shape.width / HEADS)
    if shape.mixer == "mamba3":
        config = mixer_config(shape)
        entries += config.value_heads * (config.head_dim + config.head_v_dim)
    return entries


class GatedConvolution(nnx.Module):
    """First block of every model: `y_t = (sum_i k_i u_(t-i) + c) * (W u_t + b) + u_t`.

    Args:
      width: of input and output.
      dtype: of the computation.
      rngs: random keys for the initialisation, stream `params`.
    """

    def __init__(self, width: int, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        bound = TAPS**-0.5  # PyTorch's initialisation of a depthwise convolution

        def uniform(*shape: int) -> nnx.Param[Array]:
            return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))

        self.kernel, self.bias = uniform(TAPS, width), uniform(width)
        self.projection = _linear(width, dtype, rngs)

    def __call__(self, u: Float[Array, "B T width"]) -> Float[Array, "B T width"]:
        """Mixes each token with the two before it."""
        kernel, length = self.kernel[...].astype(u.dtype), u.shape[1]
        padded = jnp.pad(u, ((0, 0), (TAPS - 1, 0), (0, 0)))
        taps = (kernel[i] * padded[:, i : i + length] for i in range(TAPS))  # the last: this token
        return (sum(taps) + self.bias[...].astype(u.dtype)) * self.projection(u) + u


class RecallModel(nnx.Module):
    """The model; logits where they are asked for.

    Args:
      shape: mixer and sizes.
      implementation: of the mixer's rule.
      dtype: of the computation; logits are float32.
      rngs: random keys for the initialisation, stream `params`.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        implementation: Implementation | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        width = shape.width
        self.dtype = dtype
        normal = jax.nn.initializers.normal(_STD)
        self.embeddings = nnx.Param(normal(rngs.params(), (shape.vocabulary, width)))
        self.convolution = GatedConvolution(width, dtype=dtype, rngs=rngs)
        self.mixer = _mixer(shape, implementation, dtype, rngs)
        self.norms = nnx.List([_norm(width, dtype, rngs) for _ in range(2 * LAYERS + 1)])

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        places: Int[Array, "B N"],
        dropout: PRNGKeyArray | None = None,
    ) -> Float[Array, "B N vocabulary"]:
        """Logits at `places`.

        Args:
          tokens: rows.
          places: of each row's queries.
          dropout: key of the dropped embeddings; None: none is dropped.
        """
        h = self.hidden(tokens, dropout)
        asked = jnp.take_along_axis(h, places[:, :, None], axis=1)
        table = self.embeddings[...].astype(self.dtype)
        return jnp.einsum("bnd,vd->bnv", asked, table, preferred_element_type=jnp.float32)

    def hidden(
        self, tokens: Int[Array, "B T"], dropout: PRNGKeyArray | None = None
    ) -> Float[Array, "B T width"]:
        """What the head is multiplied with."""
        before, *norms, last = self.norms
        h = jnp.take(self.embeddings[...], tokens, axis=0).astype(self.dtype)
        if dropout is not None:
            kept = jax.random.bernoulli(dropout, 1 - DROPOUT, h.shape)
            h = jnp.where(kept, h / (1 - DROPOUT), 0)
        h = h + self.convolution(before(h))
        h = h + norms[0](h)
        y, _ = self.mixer(norms[1](h))
        h = h + y
        return last(h + norms[2](h))


def initial_params(model: RecallModel, shape: Shape) -> dict[str, Any]:
    """The model's parameters as it starts, with the factors of its variant."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return dict(with_largest_factor(params, shape.largest_factor))


def parameter_count(shape: Shape) -> int:
    """Counts without making the arrays."""
    model = nnx.eval_shape(lambda: RecallModel(shape, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def mixer_config(shape: Shape) -> MDNConfig:
    """Of the second block: two heads, convolutions of 4, an output gate in Mamba alone."""
    heads, width = HEADS, shape.width // HEADS
    sizes = {"num_heads": heads, "head_dim": width, "expand_v": shape.value_width}
    mamba = shape.mixer in _MAMBA
    if mamba:
        sizes = {"num_heads": 1, "num_v_heads": 4 * heads, "head_dim": width, "expand_v": 0.5}
    return MDNConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=LAYERS,
        mixer=shape.mixer,
        use_gate=mamba,
        conv_bias=mamba,
        use_output_correction="uncorrected" not in shape.variant,
        intermediate_size=0,
        norm_eps=_NORM_EPSILON,
        initializer_range=_STD,
        **sizes,  # type: ignore[arg-type]
    )


def _mixer(shape: Shape, implementation: Implementation | None, dtype: Any, rngs: nnx.Rngs) -> Any:
    options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
    mixer: Any
    if shape.variant == "attention":
        mixer = SoftmaxAttention(
            shape.width, HEADS, rope_theta=None, initializer_range=_STD, **options
        )
    else:
        config = mixer_config(shape)
        mixer = STATE_MIXERS[shape.mixer](config, implementation=implementation, **options)
    if shape.mixer not in _MAMBA:  # whose own initialisation counts the layers
        kernel = mixer.o_proj.kernel
        kernel[...] = kernel[...] * (2 * LAYERS) ** -0.5
    return mixer


def _linear(width: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    normal = jax.nn.initializers.normal(_STD)
    return nnx.Linear(width, width, kernel_init=normal, dtype=dtype, rngs=rngs)


def _norm(width: int, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=_NORM_EPSILON, dtype=dtype, rngs=rngs)
