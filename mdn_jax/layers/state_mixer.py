"""What the mixers with a memory of fixed size share: projections, convolutions, cache, output."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from mdn_jax.layers.arguments import check_activations, check_cache, counted, without_padding
from mdn_jax.layers.context import (
    check_stretch,
    differing,
    entering_tails,
    inside_shard_map,
)
from mdn_jax.layers.explicit import tokens_and_cache, under_explicit_meshes
from mdn_jax.layers.norm import GateActivation, RMSNorm
from mdn_jax.layers.projection import for_two, joined_projection
from mdn_jax.layers.sharding import heads_are_cut
from mdn_jax.layers.short_conv import ShortConv, short_convolutions
from mdn_jax.ops.api import Implementation
from mdn_jax.ops.context import of_last_device
from mdn_jax.ops.residuals import RULE_OUTPUT, without_states

if TYPE_CHECKING:
    from mdn_jax.models.config import MDNConfig


Projected = tuple[Array, Array, Array] | Float[Array, "B T _"]
"""Of queries, keys and values: one each, or one array of them along the channels."""


class StateCache(NamedTuple):
    """What a layer keeps of the tokens before; a pytree of fixed shapes.

    Attributes:
      state: memory of every value head, float32 (float64 for float64).
      q_tail: the last `conv_size` outputs of `q_proj`, `[B, W, key_dim]`, oldest first, zeros
        before the first token; None without short convolutions.
      k_tail: the same of `k_proj`.
      v_tail: the same of `v_proj`, `[B, W, value_dim]`.
    """

    state: Float[Array, "B HV K V"]
    q_tail: Float[Array, "B W key_dim"] | None
    k_tail: Float[Array, "B W key_dim"] | None
    v_tail: Float[Array, "B W value_dim"] | None


class Branches(NamedTuple):
    """Queries, keys and values of a call, not normalised, and the new tails.

    Attributes:
      q: `[B, T, H, K]`.
      k: the same.
      v: `[B, T, HV, V]`.
      tails: of the three convolutions.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T HV V"]
    tails: tuple[Array | None, Array | None, Array | None]


class StateMixer(nnx.Module):
    """Token mixer `y = o_proj(output(rule(silu(conv(x W)), gates(x))))`; the base of all of them.

    A subclass makes the parameters of its gates in `_make_gates`, and names what of the rest is
    its own: `_initial_state`, `_mix` and, where it is not the gated norm of every head, the output
    in `_make_output` and `_finish`.

    Args:
      config: sizes and options.
      implementation: of the rule; None means the best one. With "scan" and "xla" convolutions and
        norms are XLA's, too.
      keep_states: for the backward pass, instead of computing them again.
      context_axis: mesh axis over which the tokens of a row are cut, see `__call__`.
      dtype: of the computation; gates, states and statistics are float32 (float64 for float64).
      param_dtype: of the parameters.
      rngs: random keys for the initialisation, stream `params`.
    """

    gate_activation: GateActivation = "sigmoid"
    cache_type: type[Any] = StateCache
    state_names: tuple[str, ...] = ("state",)  # the memories `[B, HV, K, V]` in the cache
    has_convolutions = True  # where the configuration has them
    in_context = True  # whether the tokens of a row may be cut over devices

    def __init__(
        self,
        config: "MDNConfig",
        *,
        implementation: Implementation | None = None,
        keep_states: bool = True,
        context_axis: str | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.implementation = implementation
        self.keep_states = keep_states
        if context_axis is not None and not self.in_context:
            raise ValueError(
                f"context_axis: expected None for {type(self).__name__}, got {context_axis!r}"
            )
        self.context_axis = context_axis
        self.dtype = dtype
        self.param_dtype = param_dtype
        hidden, key_dim, value_dim = config.hidden_size, config.key_dim, config.value_dim
        self.q_proj = self._linear(hidden, key_dim, rngs=rngs)
        self.k_proj = self._linear(hidden, key_dim, rngs=rngs)
        self.v_proj = self._linear(hidden, value_dim, rngs=rngs)
        self.q_conv1d = self._conv(key_dim, rngs)
        self.k_conv1d = self._conv(key_dim, rngs)
        self.v_conv1d = self._conv(value_dim, rngs)
        self._make_gates(rngs)
        self._make_output(rngs)

    def _make_gates(self, rngs: nnx.Rngs) -> None:
        """Makes the parameters between the convolutions and the output."""
        raise NotImplementedError

    def _initial_state(self, batch: int, dtype: jax.typing.DTypeLike) -> Any:
        """The state before the first token."""
        config = self.config
        sizes = (batch, config.value_heads, config.head_dim, config.head_v_dim)
        return jnp.zeros(sizes, dtype)

    def _mix(
        self,
        x: Float[Array, "B T hidden"],
        qkv: Branches,
        state: Any,
        segment_ids: Int[Array, "B T"] | None,
        own: Bool[Array, "B T 1"] | None,
    ) -> tuple[Float[Array, "B T HV V"], Any]:
        """The rule: outputs and the state after; where `own` is False the state stays as it is."""
        raise NotImplementedError

    @property
    def _rule_options(self) -> dict[str, Any]:
        return {"implementation": self.implementation, "context_axis": self.context_axis}

    def _kept[**P, R](self, rule: Callable[P, R]) -> Callable[P, R]:
        """The rule of arrays, which keeps its states for the backward pass or does not."""
        return rule if self.keep_states else without_states(rule)

    def _make_output(self, rngs: nnx.Rngs) -> None:
        self.g_proj = self._output_gate(rngs)
        self.o_norm = self._norm(self.config.head_v_dim, rngs)
        self.o_proj = self._linear(self.config.value_dim, self.config.hidden_size, rngs=rngs)

    def _output_gate(self, rngs: nnx.Rngs) -> nnx.Linear | nnx.Sequential | None:
        config = self.config
        hidden, value_dim = config.hidden_size, config.value_dim
        if not config.use_gate:
            return None
        if not config.use_lora_gate:
            return self._linear(hidden, value_dim, rngs=rngs)
        return nnx.Sequential(
            self._linear(hidden, config.gate_rank, rngs=rngs),
            self._linear(config.gate_rank, value_dim, use_bias=True, rngs=rngs),
        )

    def _norm(self, width: int, rngs: nnx.Rngs) -> RMSNorm:
        return RMSNorm(
            width,
            eps=self.config.norm_eps,
            gate_activation=self.gate_activation,
            kernels=self.implementation not in ("scan", "xla"),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=rngs,
        )

    def _finish(
        self, x: Float[Array, "B T hidden"], o: Float[Array, "B T HV V"]
    ) -> Float[Array, "B T hidden"]:
        """The layer's output from that of the rule."""
        gate = None if self.g_proj is None else self.g_proj(x).reshape(o.shape)
        return self.o_norm.down(o, gate, self.o_proj)

    def _linear(
        self, inputs: int, outputs: int, *, use_bias: bool = False, rngs: nnx.Rngs
    ) -> nnx.Linear:
        return nnx.Linear(
            inputs,
            outputs,
            use_bias=use_bias,
            kernel_init=jax.nn.initializers.normal(self.config.initializer_range),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=rngs,
        )

    def _conv(self, channels: int, rngs: nnx.Rngs) -> ShortConv | None:
        config = self.config
        if not (config.use_short_conv and self.has_convolutions):
            return None
        return ShortConv(
            channels,
            config.conv_size,
            use_bias=config.conv_bias,
            initializer_range=config.initializer_range,
            implementation="xla" if self.implementation in ("scan", "xla") else None,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=rngs,
        )

    def _projection(self, outputs: int, rngs: nnx.Rngs) -> nnx.Param[Array]:
        """The kernel of a `wide_projection`."""
        normal = jax.nn.initializers.normal(self.config.initializer_range)
        shape = (self.config.hidden_size, outputs)
        return nnx.Param(normal(rngs.params(), shape, self.param_dtype))

    def init_cache(self, batch_size: int) -> Any:
        """The cache before the first token."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        tails = (None if conv is None else conv.init_cache(batch_size) for conv in convs)
        return self.cache_type(self._initial_state(batch_size, wide), *tails)

    @under_explicit_meshes(tokens_and_cache)
    def __call__(
        self,
        x: Float[Array, "B T hidden"],
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Any = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T hidden"], Any]:
        """Mixes the tokens of each document.

        Inside a `jax.shard_map` that cuts tokens over `context_axis`, `x` and `segment_ids` are
        this device's stretch of the rows, `cache` and the cache returned those before and after
        the whole rows, the same on every device of the axis.

        Args:
          x: inputs, any float dtype.
          segment_ids: document of each token, any integers: where they change a document starts,
            and everything that carries information between tokens is reset.
          cache: continues the row's first document, whatever its id; None means it starts here.
          lengths: tokens of each row that count, 0 included; the padding after them, any values,
            has meaningless outputs and leaves no trace. None: all. Not with `segment_ids`, nor
            on stretches.

        Returns:
          The outputs in the compute dtype, and the cache of the row's last document.

        Raises:
          TypeError: a dtype or type that does not fit.
          ValueError: a shape that does not fit.
        """
        check_activations(x, self.config.hidden_size, segment_ids, lengths)
        check_stretch(lengths, self.context_axis)
        batch, length, _ = x.shape
        if cache is None:
            cache = self.init_cache(batch)
        self._check_cache(cache, batch)
        x = without_padding(x.astype(self.dtype), lengths)
        inputs = x
        if self._joins(x):
            inputs, x = for_two(x)
        projected = self.projected(inputs)
        qkv = self.convolved(projected, segment_ids, cache, lengths)
        own = None if lengths is None else counted(lengths, length)[:, :, None]
        o, state = self._mix(x, qkv, cache.state, segment_ids, own)
        o = checkpoint_name(o, RULE_OUTPUT)
        return self._finish(x, o), self._cache_after(cache, state, qkv, projected, lengths)

    def _cache_after(
        self,
        before: Any,
        state: Any,
        qkv: Branches,
        projected: Projected,
        lengths: Int[Array, " B"] | None,
    ) -> Any:
        """The cache of the state after, and of the inputs of the convolutions."""
        del before, projected, lengths
        return self.cache_type(state, *qkv.tails)

    def _check_cache(self, cache: Any, batch: int) -> None:
        config = self.config
        shapes = self._state_shapes(batch)
        if config.use_short_conv and self.has_convolutions:
            for name, width in (
                ("q", config.key_dim),
                ("k", config.key_dim),
                ("v", config.value_dim),
            ):
                shapes[f"{name}_tail"] = (batch, config.conv_size, width)
        check_cache(cache, self.cache_type, shapes)

    def _state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Of every array of the state, by its name in the cache."""
        config = self.config
        state = (batch, config.value_heads, config.head_dim, config.head_v_dim)
        return dict.fromkeys(self.state_names, state)

    def qkv(
        self,
        x: Float[Array, "B T hidden"],
        segment_ids: Int[Array, "B T"] | None,
        cache: Any,
        lengths: Int[Array, " B"] | None = None,
    ) -> Branches:
        """Projections, convolutions and silu."""
        return self.convolved(self.projected(x), segment_ids, cache, lengths)

    def projected(self, x: Float[Array, "B T hidden"]) -> Projected:
        """Inputs of the convolutions: of one product where their kernel reads them as they lie."""
        projections = self.q_proj, self.k_proj, self.v_proj
        if self._joins(x):
            return joined_projection(x, *(y.kernel[...] for y in projections))
        q, k, v = (projection(x) for projection in projections)
        return q, k, v

    def _joins(self, x: Float[Array, "B T hidden"]) -> bool:
        """Whether the inputs of the convolutions are of one product."""
        if self.q_conv1d is None or heads_are_cut() or inside_shard_map(self.context_axis):
            return False
        return self.q_conv1d.chosen(x) == "pallas_triton"

    def convolved(
        self,
        projected: Projected,
        segment_ids: Int[Array, "B T"] | None,
        cache: Any,
        lengths: Int[Array, " B"] | None = None,
    ) -> Branches:
        """What `qkv` does with the outputs of its three projections; returns the same."""
        config = self.config
        convs = [self.q_conv1d, self.k_conv1d, self.v_conv1d]
        before = tuple(cache[1:4])
        axis = self.context_axis if inside_shard_map(self.context_axis) else None
        if axis is not None:
            assert isinstance(projected, tuple)  # not joined inside `shard_map`
            before = entering_tails(projected, before, axis, segment_ids)
        like = projected[0] if isinstance(projected, tuple) else projected
        there = [differing(conv, like) for conv in convs if conv is not None]
        if there:  # all of them, or none
            pairs = short_convolutions(
                there, projected, before, segment_ids=segment_ids, lengths=lengths
            )
        else:
            pairs = [(jax.nn.silu(y), tail) for y, tail in zip(projected, before, strict=True)]
        outputs, tails = zip(*pairs, strict=True)
        if axis is not None:
            tails = of_last_device(tails, axis)
        heads = (config.num_heads, config.num_heads, config.value_heads)
        q, k, v = (y.reshape(*y.shape[:2], n, -1) for y, n in zip(outputs, heads, strict=True))
        return Branches(q, k, v, (tails[0], tails[1], tails[2]))


def zero_padding(gate: Array, own: Bool[Array, "B T 1"] | None) -> Array:
    """The gate `[B, T, HV, ...]` with zeros where a row's own steps have ended."""
    if own is None:
        return gate
    return jnp.where(own.reshape(*own.shape, *(1,) * (gate.ndim - own.ndim)), gate, 0.0)
