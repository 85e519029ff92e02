"""Mixers with decay, without momentum: Gated DeltaNet, Comba, KDA, Gated DeltaNet-2, Mamba-2."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mdn_jax.layers.initializers import log_uniform, rate_bias, scale_by_depth
from mdn_jax.layers.norm import GateActivation
from mdn_jax.layers.projection import wide_projection, wide_projections
from mdn_jax.layers.sharding import sharded_rule
from mdn_jax.layers.state_mixer import Branches, StateMixer, zero_padding
from mdn_jax.ops.gated import (
    gated_delta_rule,
    gated_delta_rule_2,
    gated_linear_attention,
    kimi_delta_rule,
)
from mdn_jax.ops.inputs import l2_normalize

State = Float[Array, "B HV K V"]


class GatedDeltaNet(StateMixer):
    """Token mixer with the gated delta rule (GDN, arXiv 2412.06464).

        log_alpha = -exp(a_log) softplus(a_proj x + dt_bias)      beta = sigmoid(b_proj x)
        y = o_proj(rms_norm(gated_delta_rule(q, k, v, log_alpha, beta)) * silu(g_proj x))

    `allow_neg_eigval`: `beta = 2 sigmoid(b_proj x)`, so that the eigenvalue `alpha (1 - beta)`
    along a key can be negative (arXiv 2411.12537). Arguments as of `StateMixer`.
    """

    gate_activation: GateActivation = "silu"

    @property
    def _largest_beta(self) -> float:
        return 2.0 if self.config.allow_neg_eigval else 1.0

    def _make_gates(self, rngs: nnx.Rngs) -> None:
        heads = self.config.value_heads
        self.a_proj = self._projection(heads, rngs)
        self.b_proj = self._projection(heads, rngs)
        self.a_log = nnx.Param(log_uniform(rngs.params(), heads, 16.0, self.param_dtype))
        self.dt_bias = nnx.Param(rate_bias(rngs.params(), heads, self.param_dtype))

    def _mix(
        self,
        x: Float[Array, "B T hidden"],
        qkv: Branches,
        state: State,
        segment_ids: Int[Array, "B T"] | None,
        own: Bool[Array, "B T 1"] | None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        q, p = self._query_and_erase_key(qkv.q, qkv.k)
        a, b = wide_projections(x, [self.a_proj[...], self.b_proj[...]])  # [B, T, HV]
        rule = partial(sharded_rule, gated_delta_rule, **self._rule_options)
        return self._kept(rule)(
            q=q,
            k=qkv.k,
            v=qkv.v,
            log_alpha=zero_padding(_decay(a, self.a_log, self.dt_bias), own),
            beta=zero_padding(self._largest_beta * jax.nn.sigmoid(b), own),
            p=p,
            initial_state=state,
            segment_ids=segment_ids,
        )

    def _query_and_erase_key(
        self, q: Float[Array, "B T H K"], k: Float[Array, "B T H K"]
    ) -> tuple[Array, Array | None]:
        return q, None


class Comba(GatedDeltaNet):
    """Token mixer with the rule of Comba, feedback scaled apart from the write (arXiv 2506.02475).

        p = sigmoid(decay) k,   q = q - d p (output correction)
        S_t = alpha_t S_(t-1) - beta_t k_t (S_(t-1)^T p_t - v_t)^T,   gates as of `GatedDeltaNet`

    `k` in the rule is normalised and so is the key in `p`; the output gate is a sigmoid. (The
    published code normalises `p` too, which takes the scale away again; here it is the paper's.)
    Arguments as of `StateMixer`.
    """

    gate_activation: GateActivation = "sigmoid"
    _largest_beta = 1.0

    def _make_gates(self, rngs: nnx.Rngs) -> None:
        super()._make_gates(rngs)
        ones = jnp.ones((self.config.num_heads,), self.param_dtype)
        self.decay = nnx.Param(ones)
        self.d = nnx.Param(jnp.copy(ones)) if self.config.use_output_correction else None

    def _query_and_erase_key(
        self, q: Float[Array, "B T H K"], k: Float[Array, "B T H K"]
    ) -> tuple[Array, Array]:
        return _feedback(q, k, self.decay[...], None if self.d is None else self.d[...])


class KimiDeltaAttention(StateMixer):
    """Token mixer with the delta rule and a decay of each key channel (KDA, arXiv 2510.26692).

        log_alpha = -exp(a_log) softplus(f_proj x + dt_bias)      beta = sigmoid(b_proj x)
        y = o_proj(rms_norm(kimi_delta_rule(q, k, v, log_alpha, beta)) * sigmoid(g_proj x))

    `f_proj` is two projections through the width of a value head, as is the published `g_proj`
    (`use_lora_gate`). As many value heads as key heads. Arguments as of `StateMixer`.
    """

    def _make_gates(self, rngs: nnx.Rngs) -> None:
        config = self.config
        self.f_proj = nnx.List(
            [
                self._linear(config.hidden_size, config.head_v_dim, rngs=rngs),
                self._linear(config.head_v_dim, config.key_dim, rngs=rngs),
            ]
        )
        self._make_strengths(rngs)
        draw = log_uniform(rngs.params(), config.num_heads, 16.0, self.param_dtype, lower=1.0)
        self.a_log = nnx.Param(draw)
        self.dt_bias = nnx.Param(rate_bias(rngs.params(), config.key_dim, self.param_dtype))

    def _make_strengths(self, rngs: nnx.Rngs) -> None:
        """Makes the projections of how much is erased and written."""
        self.b_proj = self._projection(self.config.num_heads, rngs)

    def _log_alpha(self, x: Float[Array, "B T hidden"]) -> Float[Array, "B T H K"]:
        into, out = self.f_proj
        f = wide_projection(into(x), out.kernel[...])
        f = f.reshape(*f.shape[:2], self.config.num_heads, -1)
        rate = jnp.exp(self.a_log[...].astype(f.dtype))[:, None]
        bias = self.dt_bias[...].astype(f.dtype).reshape(f.shape[2:])
        return -rate * jax.nn.softplus(f + bias)

    def _mix(
        self,
        x: Float[Array, "B T hidden"],
        qkv: Branches,
        state: State,
        segment_ids: Int[Array, "B T"] | None,
        own: Bool[Array, "B T 1"] | None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        beta = jax.nn.sigmoid(wide_projection(x, self.b_proj[...]))
        rule = partial(sharded_rule, kimi_delta_rule, **self._rule_options)
        return self._kept(rule)(
            q=qkv.q,
            k=qkv.k,
            v=qkv.v,
            log_alpha=zero_padding(self._log_alpha(x), own),
            beta=zero_padding(beta, own),
            initial_state=state,
            segment_ids=segment_ids,
        )


class GatedDeltaNet2(KimiDeltaAttention):
    """Token mixer with Gated Delta Rule-2 (Gated DeltaNet-2, arXiv 2605.22791).

        log_alpha as of `KimiDeltaAttention`,   b = sigmoid(b_proj x),   w = sigmoid(w_proj x)
        y = o_proj(rms_norm(gated_delta_rule_2(q, k, v, log_alpha, b, w)) * sigmoid(g_proj x))

    `b` has an entry for each key channel, `w` for each value channel. The published `g_proj` is two
    projections (`use_lora_gate`). As many value heads as key heads. Arguments as of `StateMixer`.
    """

    in_context = False

    def _make_strengths(self, rngs: nnx.Rngs) -> None:
        self.b_proj = self._projection(self.config.key_dim, rngs)
        self.w_proj = self._projection(self.config.value_dim, rngs)

    def _mix(
        self,
        x: Float[Array, "B T hidden"],
        qkv: Branches,
        state: State,
        segment_ids: Int[Array, "B T"] | None,
        own: Bool[Array, "B T 1"] | None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        def strength(kernel: nnx.Param[Array], like: Array) -> Array:
            return jax.nn.sigmoid(wide_projection(x, kernel[...])).reshape(like.shape)

        rule = partial(sharded_rule, gated_delta_rule_2, implementation=self.implementation)
        return self._kept(rule)(
            q=qkv.q,
            k=qkv.k,
            v=qkv.v,
            log_alpha=zero_padding(self._log_alpha(x), own),
            b=zero_padding(strength(self.b_proj, qkv.k), own),
            w=zero_padding(strength(self.w_proj, qkv.v), own),
            initial_state=state,
            segment_ids=segment_ids,
        )


class Mamba2(StateMixer):
    """Mamba-2: a state space with one decay a head (arXiv 2405.21060).

        dt = softplus(a_proj x + dt_bias),   log_alpha = -exp(a_log) dt
        o = gated_linear_attention(C, B, x, log_alpha, dt) + d x
        y = o_proj(rms_norm(o * silu(g_proj x)))      normalised over all heads together

    In the terms of the other mixers: `v_proj` gives `x`, `k_proj` `B`, `q_proj` `C` and `g_proj`
    `z`, which the published layer makes with one projection of the same parameters; `num_heads` is
    the number of groups, `head_dim` the size of the state, `num_v_heads` the number of heads.
    Arguments as of `StateMixer`.
    """

    def _make_gates(self, rngs: nnx.Rngs) -> None:
        heads = self.config.value_heads
        self.a_proj = self._projection(heads, rngs)
        draw = log_uniform(rngs.params(), heads, 16.0, self.param_dtype, lower=1.0)
        self.a_log = nnx.Param(draw)
        self.dt_bias = nnx.Param(rate_bias(rngs.params(), heads, self.param_dtype))
        self.d = nnx.Param(jnp.ones((heads,), self.param_dtype))

    def _make_output(self, rngs: nnx.Rngs) -> None:
        super()._make_output(rngs)
        self.o_norm = self._norm(self.config.value_dim, rngs)
        scale_by_depth(self.o_proj, self.config.num_hidden_layers, rngs)

    def _mix(
        self,
        x: Float[Array, "B T hidden"],
        qkv: Branches,
        state: State,
        segment_ids: Int[Array, "B T"] | None,
        own: Bool[Array, "B T 1"] | None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        a = wide_projection(x, self.a_proj[...])
        dt = jax.nn.softplus(a + self.dt_bias[...].astype(a.dtype))
        log_alpha = -jnp.exp(self.a_log[...].astype(a.dtype)) * dt
        rule = partial(sharded_rule, gated_linear_attention, scale=1.0, **self._rule_options)
        o, state = self._kept(rule)(
            q=qkv.q,
            k=qkv.k,
            v=qkv.v,
            log_alpha=zero_padding(log_alpha, own),
            beta=zero_padding(dt, own),
            initial_state=state,
            segment_ids=segment_ids,
        )
        return o + (self.d[...].astype(o.dtype)[:, None] * qkv.v), state

    def _finish(
        self, x: Float[Array, "B T hidden"], o: Float[Array, "B T HV V"]
    ) -> Float[Array, "B T hidden"]:
        o = o.reshape(*o.shape[:2], -1)
        if self.g_proj is not None:
            o = o * jax.nn.silu(self.g_proj(x))
        return self.o_proj(self.o_norm(o))


def _decay(a: Array, a_log: nnx.Param[Array], dt_bias: nnx.Param[Array]) -> Array:
    """`-exp(a_log) softplus(a + dt_bias)` in `a`'s dtype."""
    rate = jnp.exp(a_log[...].astype(a.dtype))
    return -rate * jax.nn.softplus(a + dt_bias[...].astype(a.dtype))


@jax.checkpoint  # keeps its inputs, nothing wide
def _feedback(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    decay: Float[Array, " H"],
    d: Float[Array, " H"] | None,
) -> tuple[Array, Array]:
    """Comba's query, corrected, and its erase key."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scale = jax.nn.sigmoid(decay.astype(wide))[:, None]
    k = k.astype(wide)
    if d is not None:
        q = (q.astype(wide) - d.astype(wide)[:, None] * scale * k).astype(q.dtype)
    return q, (scale * l2_normalize(k)).astype(q.dtype)
