"""The Momentum DeltaNet layer."""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mdn_jax.layers.arguments import check_activations, check_cache, counted
from mdn_jax.layers.gates import MomentumGates
from mdn_jax.layers.initializers import log_uniform
from mdn_jax.layers.norm import RMSNorm
from mdn_jax.layers.sharding import sharded_momentum_delta_rule
from mdn_jax.layers.short_conv import ShortConv
from mdn_jax.ops.api import Implementation
from mdn_jax.ops.inputs import l2_normalize
from mdn_jax.ops.residuals import RULE_OUTPUT, without_states
from mdn_jax.ops.state import MDNState

if TYPE_CHECKING:
    from mdn_jax.models.config import MDNConfig


class MDNCache(NamedTuple):
    """What a layer keeps of the tokens before; a pytree of fixed shapes.

    Attributes:
      state: memory and momentum of every value head, float32 (float64 for float64).
      q_tail: the last `conv_size` outputs of `q_proj`, `[B, W, key_dim]`, oldest first, zeros
        before the first token; None without short convolutions.
      k_tail: the same of `k_proj`.
      v_tail: the same of `v_proj`, `[B, W, value_dim]`.
    """

    state: MDNState
    q_tail: Float[Array, "B W key_dim"] | None
    k_tail: Float[Array, "B W key_dim"] | None
    v_tail: Float[Array, "B W value_dim"] | None


class MomentumDeltaNet(nnx.Module):
    """Token mixer with the momentum delta rule (MDN, arXiv 2605.05838).

        q, k, v = silu(conv(x W));   q = q - exp(d_log) k
        o = momentum_delta_rule(q, k, v, gates(x))
        y = o_proj(rms_norm(o) * sigmoid(g_proj x))

    Args:
      config: sizes and options.
      implementation: of the rule, see `momentum_delta_rule`; None means the best one.
      keep_states: for the backward pass, instead of computing them again.
      dtype: of the computation; gates, states and statistics are float32 (float64 for float64).
      param_dtype: of the parameters.
      rngs: random keys for the initialisation, stream `params`.
    """

    def __init__(
        self,
        config: "MDNConfig",
        *,
        implementation: Implementation | None = None,
        keep_states: bool = True,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.implementation = implementation
        self.keep_states = keep_states
        self.dtype = dtype
        std = config.initializer_range

        def linear(inputs: int, outputs: int, use_bias: bool = False) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=use_bias,
                kernel_init=jax.nn.initializers.normal(std),
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        def conv(channels: int) -> ShortConv | None:
            if not config.use_short_conv:
                return None
            return ShortConv(
                channels,
                config.conv_size,
                use_bias=config.conv_bias,
                initializer_range=std,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        hidden, key_dim, value_dim = config.hidden_size, config.key_dim, config.value_dim
        self.q_proj = linear(hidden, key_dim)
        self.k_proj = linear(hidden, key_dim)
        self.v_proj = linear(hidden, value_dim)
        self.q_conv1d = conv(key_dim)
        self.k_conv1d = conv(key_dim)
        self.v_conv1d = conv(value_dim)
        self.gates = MomentumGates(
            hidden,
            config.value_heads,
            min_log_mu=config.min_log_mu,
            tau_factor=config.tau_factor,
            initializer_range=std,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.d_log: nnx.Param[Array] | None
        if config.use_output_correction:
            draw = log_uniform(rngs.params(), config.value_heads, 1.0, param_dtype)
            self.d_log = nnx.Param(draw)
        else:
            self.d_log = None
        self.g_proj: nnx.Linear | nnx.Sequential | None
        if not config.use_gate:
            self.g_proj = None
        elif config.use_lora_gate:
            rank = config.gate_rank
            self.g_proj = nnx.Sequential(linear(hidden, rank), linear(rank, value_dim, True))
        else:
            self.g_proj = linear(hidden, value_dim)
        self.o_norm = RMSNorm(
            config.head_v_dim, eps=config.norm_eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.o_proj = linear(value_dim, hidden)

    def init_cache(self, batch_size: int) -> MDNCache:
        """The cache before the first token."""
        config = self.config
        wide = jnp.promote_types(self.dtype, jnp.float32)
        sizes = (batch_size, config.value_heads, config.head_dim, config.head_v_dim)
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        tails = (None if conv is None else conv.init_cache(batch_size) for conv in convs)
        return MDNCache(MDNState.zeros(*sizes, wide), *tails)

    def __call__(
        self,
        x: Float[Array, "B T hidden"],
        segment_ids: Int[Array, "B T"] | None = None,
        cache: MDNCache | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T hidden"], MDNCache]:
        """Mixes the tokens of each document.

        Args:
          x: inputs, any float dtype.
          segment_ids: document of each token, non-decreasing along `T`; a change resets
            everything that carries information between tokens.
          cache: continues the row's first document; None means it starts here.
          lengths: tokens of each row that count, 0 included; the padding after them has
            meaningless outputs and leaves no trace in the cache. None: all. Not with `segment_ids`.

        Returns:
          The outputs in the compute dtype, and the cache of the row's last document.

        Raises:
          TypeError: a dtype or type that does not fit.
          ValueError: a shape that does not fit.
        """
        config = self.config
        check_activations(x, config.hidden_size, segment_ids, lengths)
        batch, length, _ = x.shape
        if cache is None:
            cache = self.init_cache(batch)
        self._check_cache(cache, batch)
        x = x.astype(self.dtype)
        q, k, v, tails = self.qkv(x, segment_ids, cache, lengths)
        gates = self.gates(x)
        if lengths is not None:  # alpha = mu = 1, beta = eta = 0: the states stay as they are
            own = counted(lengths, length)[:, :, None]
            gates = jax.tree.map(lambda gate: jnp.where(own, gate, 0.0), gates)
        p = None
        if not config.use_p_times_alpha:
            p = l2_normalize(k.astype(gates.eta.dtype)).astype(k.dtype)
        rule = partial(sharded_momentum_delta_rule, implementation=self.implementation)
        o, state = (rule if self.keep_states else without_states(rule))(
            q,
            k,
            v,
            gates.log_alpha,
            gates.log_mu,
            gates.beta,
            gates.eta,
            p=p,
            initial_state=cache.state,
            segment_ids=segment_ids,
        )
        o = checkpoint_name(o, RULE_OUTPUT)
        gate = None if self.g_proj is None else self.g_proj(x).reshape(o.shape)
        y = self.o_proj(self.o_norm(o, gate).reshape(batch, length, config.value_dim))
        return y, MDNCache(state, *tails)

    def _check_cache(self, cache: MDNCache, batch: int) -> None:
        config = self.config
        state = (batch, config.value_heads, config.head_dim, config.head_v_dim)
        shapes: dict[str, tuple[int, ...]] = {"state.s": state, "state.m": state}
        if config.use_short_conv:
            for name, width in (
                ("q", config.key_dim),
                ("k", config.key_dim),
                ("v", config.value_dim),
            ):
                shapes[f"{name}_tail"] = (batch, config.conv_size, width)
        check_cache(cache, MDNCache, shapes)

    def qkv(
        self,
        x: Float[Array, "B T hidden"],
        segment_ids: Int[Array, "B T"] | None,
        cache: MDNCache,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Array, Array, Array, tuple[Array | None, ...]]:
        """Queries, keys and values as the rule takes them, and the new tails of the convolutions.

        Returns:
          `q, k` `[B, T, H, K]` (`[B, T, HV, K]` with output correction), `v` `[B, T, HV, V]`, not
          normalised, and the three tails.
        """
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.convolved(projected, segment_ids, cache, lengths)

    def convolved(
        self,
        projected: tuple[Array, Array, Array],
        segment_ids: Int[Array, "B T"] | None,
        cache: MDNCache,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Array, Array, Array, tuple[Array | None, ...]]:
        """What `qkv` does with the outputs of its three projections; returns the same."""
        config = self.config
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        outputs, tails = [], []
        for y, conv, tail in zip(projected, convs, cache[1:], strict=True):
            if conv is None or tail is None:
                y = jax.nn.silu(y)
            else:
                y, tail = conv(y, tail, segment_ids=segment_ids, lengths=lengths)
            outputs.append(y)
            tails.append(tail)
        heads = (config.num_heads, config.num_heads, config.value_heads)
        q, k, v = (y.reshape(*y.shape[:2], n, -1) for y, n in zip(outputs, heads, strict=True))
        if self.d_log is not None:
            # The correction has a factor per value head, so its result cannot be shared by a group.
            groups = config.value_heads // config.num_heads
            q, k = (jnp.repeat(y, groups, axis=2) if groups > 1 else y for y in (q, k))
            q = _correct(q, k, self.d_log[...])
        return q, k, v, tuple(tails)


@jax.checkpoint  # keeps its inputs, nothing wide
def _correct(
    q: Float[Array, "B T HV K"], k: Float[Array, "B T HV K"], d_log: Float[Array, " HV"]
) -> Float[Array, "B T HV K"]:
    wide = jnp.promote_types(q.dtype, jnp.float32)
    factor = jnp.exp(d_log.astype(wide))[:, None]
    return (q.astype(wide) - factor * k.astype(wide)).astype(q.dtype)
