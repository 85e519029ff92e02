"""The Mamba-3 layer."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mdn_jax.layers.initializers import rate_bias, scale_by_depth
from mdn_jax.layers.projection import wide_projection, wide_projections
from mdn_jax.layers.sharding import sharded_rule
from mdn_jax.layers.state_mixer import Branches, Projected, StateMixer, zero_padding
from mdn_jax.ops.gated import TrapezoidalState, trapezoidal_linear_attention

_LEAST_RATE = 1e-4


class Mamba3Cache(NamedTuple):
    """What a layer keeps of the tokens before; a pytree of fixed shapes.

    Attributes:
      state: memory, last key and last value of every value head, float32 (float64 for float64).
      q_tail: None: there are no convolutions.
      k_tail: None.
      v_tail: None.
    """

    state: TrapezoidalState
    q_tail: None = None
    k_tail: None = None
    v_tail: None = None


class Mamba3(StateMixer):
    """Mamba-3: a trapezoidal step and a rotating state, one input and one output (2603.15569).

        dt = softplus(dt_proj x + dt_bias),     log_alpha = -max(softplus(a_proj x), 1e-4) dt
        lam = sigmoid(lam_proj x),              angles = pi tanh(angle_proj x) dt
        C, B = rms_norm(q_proj x) + q_bias, rms_norm(k_proj x) + k_bias
        o = trapezoidal_linear_attention(C, B, x, log_alpha, dt, lam, angles) + d x
        y = o_proj(o * silu(g_proj x))

    In the terms of the other mixers: `v_proj` gives `x`, `k_proj` `B`, `q_proj` `C` and `g_proj`
    `z`; `num_heads` is the number of groups, `head_dim` the size of the state, `num_v_heads` the
    number of heads. Half of a state's channels turn. Without convolutions and without a norm of the
    output, as published. Arguments as of `StateMixer`.
    """

    cache_type = Mamba3Cache
    state_names = ("state.s", "state.k", "state.v")
    has_convolutions = False
    in_context = False

    def _make_gates(self, rngs: nnx.Rngs) -> None:
        config, heads = self.config, self.config.value_heads
        self.dt_proj = self._projection(heads, rngs)
        self.a_proj = self._projection(heads, rngs)
        self.lam_proj = self._projection(heads, rngs)
        self.angle_proj = self._projection(config.head_dim // 4, rngs)
        self.dt_bias = nnx.Param(rate_bias(rngs.params(), heads, self.param_dtype))
        self.q_norm = self._norm(config.head_dim, rngs)
        self.k_norm = self._norm(config.head_dim, rngs)
        ones = jnp.ones((heads, config.head_dim), self.param_dtype)
        self.q_bias, self.k_bias = nnx.Param(ones), nnx.Param(jnp.copy(ones))
        self.d = nnx.Param(jnp.ones((heads,), self.param_dtype))

    def _make_output(self, rngs: nnx.Rngs) -> None:
        config = self.config
        self.g_proj = self._output_gate(rngs)
        self.o_proj = self._linear(config.value_dim, config.hidden_size, rngs=rngs)
        scale_by_depth(self.o_proj, config.num_hidden_layers, rngs)

    def _initial_state(self, batch: int, dtype: jax.typing.DTypeLike) -> TrapezoidalState:
        return TrapezoidalState(*(jnp.zeros(x, dtype) for x in self._state_shapes(batch).values()))

    def _state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        config = self.config
        heads, key_dim, value_dim = config.value_heads, config.head_dim, config.head_v_dim
        widths = ((key_dim, value_dim), (key_dim,), (value_dim,))
        return {
            name: (batch, heads, *width)
            for name, width in zip(self.state_names, widths, strict=True)
        }

    def _mix(
        self,
        x: Float[Array, "B T hidden"],
        qkv: Branches,
        state: TrapezoidalState,
        segment_ids: Int[Array, "B T"] | None,
        own: Bool[Array, "B T 1"] | None,
    ) -> tuple[Float[Array, "B T HV V"], TrapezoidalState]:
        dt, a, lam = wide_projections(x, [self.dt_proj[...], self.a_proj[...], self.lam_proj[...]])
        dt = zero_padding(jax.nn.softplus(dt + self.dt_bias[...].astype(dt.dtype)), own)
        angles = jnp.tanh(wide_projection(x, self.angle_proj[...]))[:, :, None]
        rule = partial(
            sharded_rule,
            trapezoidal_linear_attention,
            scale=1.0,
            implementation=self.implementation,
        )
        k = self._biased(self.k_norm(qkv.k), self.k_bias[...])
        o, after = self._kept(rule)(
            q=self._biased(self.q_norm(qkv.q), self.q_bias[...]),
            k=k,
            v=qkv.v,
            log_alpha=-jnp.maximum(jax.nn.softplus(a), _LEAST_RATE) * dt,
            dt=dt,
            lam=jax.nn.sigmoid(lam),
            angles=math.pi * angles * dt[..., None],
            initial_state=state,
            segment_ids=segment_ids,
        )
        if own is not None:  # of the last step that counts, if there is one
            count = own.sum(axis=1)[:, :, None, None]

            def last(before: Array, steps: Array) -> Array:
                steps = jnp.concatenate([before[:, None], steps.astype(before.dtype)], axis=1)
                return jnp.take_along_axis(steps, count, axis=1)[:, 0]

            after = TrapezoidalState(after.s, last(state.k, k), last(state.v, qkv.v))
        return o + (self.d[...].astype(o.dtype)[:, None] * qkv.v), after

    def _biased(
        self, x: Float[Array, "B T H K"], bias: Float[Array, "HV K"]
    ) -> Float[Array, "B T HV K"]:
        groups = self.config.value_heads // self.config.num_heads
        wide = jnp.promote_types(x.dtype, jnp.float32)
        x = jnp.repeat(x, groups, axis=2) if groups > 1 else x
        return (x.astype(wide) + bias.astype(wide)).astype(x.dtype)

    def convolved(
        self,
        projected: Projected,
        segment_ids: Int[Array, "B T"] | None,
        cache: Any,
        lengths: Int[Array, " B"] | None = None,
    ) -> Branches:
        """The projections as they are, by heads: there is no convolution and no silu."""
        del segment_ids, cache, lengths
        config = self.config
        heads = (config.num_heads, config.num_heads, config.value_heads)
        q, k, v = (y.reshape(*y.shape[:2], n, -1) for y, n in zip(projected, heads, strict=True))
        return Branches(q, k, v, (None, None, None))

    def _finish(
        self, x: Float[Array, "B T hidden"], o: Float[Array, "B T HV V"]
    ) -> Float[Array, "B T hidden"]:
        o = o.reshape(*o.shape[:2], -1)
        if self.g_proj is not None:
            o = o * jax.nn.silu(self.g_proj(x))
        return self.o_proj(o)
