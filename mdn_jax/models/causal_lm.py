"""The language model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mdn_jax.layers.arguments import check_lengths
from mdn_jax.layers.attention import AttentionCache, SoftmaxAttention
from mdn_jax.layers.context import inside_shard_map, numbered_documents
from mdn_jax.layers.explicit import of_tokens, tokens_and_cache, under_explicit_meshes
from mdn_jax.layers.gated import (
    Comba,
    GatedDeltaNet,
    GatedDeltaNet2,
    KimiDeltaAttention,
    Mamba2,
)
from mdn_jax.layers.mamba3 import Mamba3, Mamba3Cache
from mdn_jax.layers.mlp import SwiGLU
from mdn_jax.layers.momentum_deltanet import MDNCache, MomentumDeltaNet, TitansMemory
from mdn_jax.layers.norm import RMSNorm
from mdn_jax.layers.projection import wide_projection
from mdn_jax.layers.replay_cache import ReplayCache
from mdn_jax.layers.sharding import all_ids, all_tokens, embedded_tokens, named_axes, shared_tokens
from mdn_jax.layers.state_mixer import StateCache, StateMixer
from mdn_jax.models.config import MDNConfig, Mixer
from mdn_jax.models.remat import Remat, check_remat, with_remat
from mdn_jax.models.unknown_tokens import marked_cache, marks, split_unknown
from mdn_jax.ops.api import Implementation
from mdn_jax.ops.arguments import check_segment_ids
from mdn_jax.ops.on_mesh import Cuts
from mdn_jax.ops.state import StateDtype

LayerCache = MDNCache | ReplayCache | StateCache | Mamba3Cache | AttentionCache
ModelCache = tuple[LayerCache, ...]
Blocks = Callable[
    [Float[Array, "B T hidden"], Int[Array, "B T"] | None], Float[Array, "B T hidden"]
]
"""From the embeddings and the documents to what the last block gives."""

STATE_MIXERS: dict[Mixer, type[StateMixer]] = {
    "mdn": MomentumDeltaNet,
    "gdn": GatedDeltaNet,
    "kda": KimiDeltaAttention,
    "comba": Comba,
    "gdn2": GatedDeltaNet2,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "titans": TitansMemory,
}
"""Every mixer but softmax attention."""


class Block(nnx.Module):
    """`h += mixer(norm(h))`, then `h += mlp(norm(h))` unless the model has no MLP.

    Args:
      config: of the model.
      layer: index of the block; decides which mixer it has.
      implementation: of the momentum delta rule; "scan" and "xla" of the other mixers' rules too,
        and with them no kernel runs.
      remat: what its derivative keeps, see `mdn_jax.models.remat`.
      context_axis: mesh axis over which the tokens of a row are cut.
      dtype: of the computation and of `h`.
      param_dtype: of the parameters.
      rngs: random keys for the initialisation, stream `params`.
    """

    def __init__(
        self,
        config: MDNConfig,
        layer: int,
        *,
        implementation: Implementation | None = None,
        remat: Remat = "none",
        context_axis: str | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.remat = remat
        options: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        std = config.initializer_range
        kernels = implementation not in ("scan", "xla")
        norm = partial(RMSNorm, config.hidden_size, eps=config.norm_eps, kernels=kernels, **options)
        self.mixer_norm = norm()
        kind = config.mixer_of(layer)
        self.mixer: SoftmaxAttention | StateMixer
        if kind == "attention":
            attention = config.attention
            self.mixer = SoftmaxAttention(
                config.hidden_size,
                attention.num_heads,
                num_kv_heads=attention.num_kv_heads,
                qkv_bias=attention.qkv_bias,
                window_size=attention.window_size,
                rope_theta=attention.rope_theta,
                initializer_range=std,
                context_axis=context_axis,
                **options,
            )
        else:
            shared = kind in ("mdn", "titans") or implementation in ("scan", "xla")
            self.mixer = STATE_MIXERS[kind](
                config,
                implementation=implementation if shared else None,
                keep_states=remat != "states",
                context_axis=context_axis,
                **options,
            )
        self.mlp: SwiGLU | None
        if config.mlp_width == 0:
            self.mlp_norm, self.mlp = None, None
            return
        self.mlp_norm = norm()
        self.mlp = SwiGLU(
            config.hidden_size,
            config.mlp_width,
            initializer_range=std,
            kernels=kernels,
            **options,
        )

    def __call__(
        self,
        h: Float[Array, "B T hidden"],
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Any = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T hidden"], LayerCache]:
        """Applies the block; the arguments are those of its mixer."""
        x, h = self.mixer_norm.with_input(h)
        y, cache = self.mixer(all_tokens(x), segment_ids, cache, lengths)
        h = h + shared_tokens(y)
        if self.mlp is None or self.mlp_norm is None:
            return h, cache
        x, h = self.mlp_norm.with_input(h)
        return h + shared_tokens(self.mlp(all_tokens(x))), cache


def apply_block(
    block: Block,
    h: Float[Array, "B T hidden"],
    segment_ids: Int[Array, "B T"] | None = None,
    cache: Any = None,
    lengths: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T hidden"], LayerCache]:
    """A block's result, by a program that is traced and lowered once for blocks of one kind."""
    graph, state = nnx.split(block)
    result: tuple[Array, LayerCache] = _jitted(
        graph, block.remat, named_axes(), state, h, segment_ids, cache, lengths
    )
    return result


@partial(jax.jit, static_argnums=(0, 1, 2))
def _jitted(graph: Any, remat: Remat, axes: Cuts, state: Any, *inputs: Any) -> Any:
    del axes  # of the ambient mesh: another trace
    run = with_remat(lambda state, *inputs: nnx.merge(graph, state)(*inputs), remat)
    return run(state, *inputs)


class MDNForCausalLM(nnx.Module):
    """Momentum DeltaNet language model (MDN, arXiv 2605.05838), or the same with other mixers.

    Args:
      config: sizes and options.
      implementation: of the momentum delta rule, see `momentum_delta_rule`; "scan" and "xla" are
        used for the other mixers' rules too; None: the best one of each.
      remat: which activations of a block are kept for the backward pass and which computed again,
        see `mdn_jax.models.remat`.
      context_axis: mesh axis over which the tokens of a row are cut, see `__call__`; None: rows are
        whole, or the partitioner of `jax.jit` cuts them.
      dtype: of the computation; gates, states, softmax, statistics and logits are float32 (float64
        for float64).
      param_dtype: of the parameters.
      rngs: random keys for the initialisation, stream `params`.
    """

    def __init__(
        self,
        config: MDNConfig,
        *,
        implementation: Implementation | None = None,
        remat: Remat = "none",
        context_axis: str | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        check_remat(remat)
        self.context_axis = context_axis
        self.dtype = dtype
        options: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        normal = jax.nn.initializers.normal(config.initializer_range)
        shape = (config.vocab_size, config.hidden_size)
        self.embeddings = nnx.Param(normal(rngs.params(), shape, param_dtype))
        self.layers = nnx.List(
            [
                Block(
                    config,
                    layer,
                    implementation=implementation,
                    remat=remat,
                    context_axis=context_axis,
                    **options,
                )
                for layer in range(config.num_hidden_layers)
            ]
        )
        self.norm = RMSNorm(
            config.hidden_size,
            eps=config.norm_eps,
            kernels=implementation not in ("scan", "xla"),
            **options,
        )
        self.lm_head: nnx.Param[Array] | None
        if config.tie_word_embeddings:
            self.lm_head = None
        else:
            self.lm_head = nnx.Param(normal(rngs.params(), shape[::-1], param_dtype))

    def init_cache(
        self,
        batch_size: int,
        max_length: int | None = None,
        *,
        state_dtype: StateDtype = "float32",
        replay: int | None = None,
    ) -> ModelCache:
        """The cache before the first token, one entry a layer.

        Args:
          batch_size: rows.
          max_length: tokens for which softmax attention makes room at once, so that no call
            changes a shape, and beyond which it forgets the oldest; None: its cache grows. The
            other mixers have a state of fixed size.
          state_dtype: how momentum delta rules keep their states between calls: "float32",
            "bfloat16" or "float16_scaled".
          replay: L, 4, 8 or 16: they write them every L tokens and can go back (`rewind_cache`).
        """

        def own(mixer: SoftmaxAttention | StateMixer) -> LayerCache:
            cache: LayerCache
            if isinstance(mixer, SoftmaxAttention):
                cache = mixer.init_cache(batch_size, max_length)
            elif isinstance(mixer, MomentumDeltaNet):
                cache = mixer.init_cache(batch_size, state_dtype=state_dtype, replay=replay)
            else:
                cache = mixer.init_cache(batch_size)
            return cache

        return tuple(own(layer.mixer) for layer in self.layers)

    @under_explicit_meshes(tokens_and_cache)
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        cache: ModelCache | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T vocab"], ModelCache]:
        """Logits of the next token.

        Inside a `jax.shard_map` that cuts tokens over `context_axis`, `tokens` and `segment_ids`
        are this device's stretch of the rows, and so are the logits; `cache` and the cache returned
        are those before and after the whole rows.

        Args:
          tokens: ids in `[0, vocab_size)`, any integer dtype. An id outside, a negative one too,
            gives nan there and in what follows of its document, in the cache as well.
          segment_ids: document of each token, any integers: where they change a document starts
            (an id that comes back is a new one), and documents never see each other.
          cache: continues the row's first document, whatever its id; None means it starts here.
          lengths: tokens of each row that count, 0 included; the padding after them, any ids at
            all, has meaningless logits and leaves no trace in anything else. None: all. Not with
            `segment_ids`.

        Returns:
          The logits, float32 (float64 for float64), and the cache of the row's last document.

        Raises:
          TypeError: a dtype or type that does not fit.
          ValueError: a shape that does not fit.
        """
        h, cache = self.hidden(tokens, segment_ids, cache, lengths)
        return self.logits(h), cache

    @under_explicit_meshes(tokens_and_cache)
    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        cache: ModelCache | None = None,
        lengths: Int[Array, " B"] | None = None,
        *,
        blocks: Blocks | None = None,
    ) -> tuple[Float[Array, "B T hidden"], ModelCache]:
        """Everything before the output projection, in the compute dtype; arguments as the call's.

        Args:
          tokens: as the call's, and so are the others.
          segment_ids: may be None.
          cache: may be None.
          lengths: may be None.
          blocks: what takes the embeddings, and the numbered documents, through all blocks in place
            of the model's layers, such as a scan over them; without `cache`, `lengths` and a
            mesh with Explicit axes. The cache returned is then empty.

        Raises:
          TypeError: a dtype or type that does not fit.
          ValueError: a shape that does not fit.
        """
        self._check(tokens, segment_ids, cache, lengths)
        axis = self.context_axis if inside_shard_map(self.context_axis) else None
        documents, tokens = None, all_ids(tokens)
        if segment_ids is not None:
            documents = all_ids(numbered_documents(all_ids(segment_ids), axis))
        h, unknown = self.embed(tokens, lengths)
        h = embedded_tokens(h)
        caches = []
        if blocks is not None:
            h = blocks(h, documents)
        else:
            for layer, before in zip(self.layers, cache or [None] * len(self.layers), strict=True):
                h, after = apply_block(layer, h, documents, before, lengths)
                caches.append(after)
        nans, last = marks(unknown, documents, h.dtype, axis)
        if caches:  # in the first layer it reaches all that follow
            caches[0] = marked_cache(caches[0], last)
        return self.norm(h) + nans[:, :, None], tuple(caches)

    @under_explicit_meshes(of_tokens)
    def embed(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B T hidden"], Bool[Array, "B T"]]:
        """The embeddings in the compute dtype, and which tokens are not in the vocabulary.

        Those, and the padding behind `lengths`, have the embedding of token 0.
        """
        ids, unknown = split_unknown(tokens, self.config.vocab_size, lengths)
        # The cast comes after the lookup: the gradients of one token's occurrences add up in the
        # parameter's dtype.
        return jnp.take(self.embeddings[...], ids, axis=0).astype(self.dtype), unknown

    @under_explicit_meshes(of_tokens)
    def logits(self, h: Float[Array, "*B hidden"]) -> Float[Array, "*B vocab"]:
        """Output projection of `hidden`'s result, float32 (float64 for float64)."""
        return wide_projection(h, self.output_kernel())

    def output_kernel(self) -> Float[Array, "hidden vocab"]:
        """Weights of the output projection in the parameters' dtype; tied: the embeddings'."""
        return self.embeddings[...].T if self.lm_head is None else self.lm_head[...]

    def _check(
        self,
        tokens: Array,
        segment_ids: Array | None,
        cache: ModelCache | None,
        lengths: Array | None,
    ) -> None:
        if not hasattr(tokens, "dtype") or not hasattr(tokens, "shape"):
            raise TypeError(f"tokens: expected an array [B, T], got {type(tokens).__name__}")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"tokens: expected an integer dtype, got {tokens.dtype.name}")
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens: expected [B, T] with B, T >= 1, got {list(tokens.shape)}")
        if segment_ids is not None:
            check_segment_ids(segment_ids, (tokens.shape[0], tokens.shape[1]))
        check_lengths(lengths, segment_ids, (tokens.shape[0], tokens.shape[1]))
        if cache is not None:
            if not isinstance(cache, tuple | list):
                raise TypeError(f"cache: expected a tuple or None, got {type(cache).__name__}")
            if len(cache) != len(self.layers):
                raise ValueError(
                    f"cache: expected {len(self.layers)} entries (the layers), got {len(cache)}"
                )
