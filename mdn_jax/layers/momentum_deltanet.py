"""The Momentum DeltaNet layer, and the memory of Titans."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mdn_jax.layers.context import inside_shard_map
from mdn_jax.layers.gates import MomentumGates, TitansGates
from mdn_jax.layers.initializers import log_uniform
from mdn_jax.layers.replay_cache import ReplayCache, advanced, started
from mdn_jax.layers.sharding import sharded_momentum_delta_rule, sharded_rule
from mdn_jax.layers.state_mixer import Branches, Projected, StateMixer, zero_padding
from mdn_jax.ops.inputs import l2_normalize
from mdn_jax.ops.replay import fold, replay_state, replay_steps
from mdn_jax.ops.state import Kept, MDNState, ReplayState, StateDtype, full, keep, kept_as


class MDNCache(NamedTuple):
    """What a layer keeps of the tokens before; a pytree of fixed shapes.

    Attributes:
      state: memory and momentum of every value head, float32 (float64 for float64), or a
        `CompactState`, which goes on as one.
      q_tail: the last `conv_size` outputs of `q_proj`, `[B, W, key_dim]`, oldest first, zeros
        before the first token; None without short convolutions.
      k_tail: the same of `k_proj`.
      v_tail: the same of `v_proj`, `[B, W, value_dim]`.
    """

    state: Kept
    q_tail: Float[Array, "B W key_dim"] | None
    k_tail: Float[Array, "B W key_dim"] | None
    v_tail: Float[Array, "B W value_dim"] | None


class MomentumDeltaNet(StateMixer):
    """Token mixer with the momentum delta rule (MDN, arXiv 2605.05838).

        q, k, v = silu(conv(x W));   q = q - exp(d_log) k
        o = momentum_delta_rule(q, k, v, gates(x))
        y = o_proj(rms_norm(o) * sigmoid(g_proj x))

    Args:
      config: sizes and options.
      implementation: of the rule, see `momentum_delta_rule`; None means the best one.
      keep_states: for the backward pass, instead of computing them again.
      context_axis: mesh axis over which the tokens of a row are cut (docs/long_context.md).
      dtype: of the computation; gates, states and statistics are float32 (float64 for float64).
      param_dtype: of the parameters.
      rngs: random keys for the initialisation, stream `params`.
    """

    cache_type = MDNCache
    state_names = ("state.s", "state.m")

    def _make_gates(self, rngs: nnx.Rngs) -> None:
        config = self.config
        self.gates: MomentumGates | TitansGates = MomentumGates(
            config.hidden_size,
            config.value_heads,
            min_log_mu=config.min_log_mu,
            tau_factor=config.tau_factor,
            use_momentum=config.use_momentum,
            bound=config.bound,
            erase_by_alpha=config.use_p_times_alpha,
            initializer_range=config.initializer_range,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=rngs,
        )
        self.d_log: nnx.Param[Array] | None
        if config.use_output_correction:
            draw = log_uniform(rngs.params(), config.value_heads, 1.0, self.param_dtype)
            self.d_log = nnx.Param(draw)
        else:
            self.d_log = None

    @property
    def erases_decayed(self) -> bool:
        """Whether the erase key is `alpha` times the normalised key, not the normalised key."""
        return self.config.use_p_times_alpha

    def _initial_state(self, batch: int, dtype: jax.typing.DTypeLike) -> MDNState:
        config = self.config
        sizes = (batch, config.value_heads, config.head_dim, config.head_v_dim)
        return MDNState.zeros(*sizes, dtype)

    def _mix(
        self,
        x: Float[Array, "B T hidden"],
        qkv: Branches,
        state: Kept | ReplayState,
        segment_ids: Int[Array, "B T"] | None,
        own: Bool[Array, "B T 1"] | None,
    ) -> tuple[Float[Array, "B T HV V"], Any]:
        # alpha = mu = 1, beta = eta = 0: the states stay as they are
        gates = jax.tree.map(lambda gate: zero_padding(gate, own), self.gates(x))
        p = None
        if not self.erases_decayed:
            p = l2_normalize(qkv.k.astype(gates.eta.dtype)).astype(qkv.k.dtype)
        if isinstance(state, ReplayState) and x.shape[1] <= state.length:
            return self._replayed(qkv, gates, p, state, segment_ids, own)
        rule = partial(sharded_momentum_delta_rule, **self._rule_options)
        after: Kept | ReplayState
        o, after = self._kept(rule)(
            qkv.q,
            qkv.k,
            qkv.v,
            gates.log_alpha,
            gates.log_mu,
            gates.beta,
            gates.eta,
            p=p,
            initial_state=fold(state) if isinstance(state, ReplayState) else state,
            segment_ids=segment_ids,
        )
        if isinstance(state, ReplayState):  # nothing goes back into a longer call
            after = replay_state(
                after, state.length, heads=state.keys.shape[1], dtype=state.keys.dtype
            )
        return o, after

    def _replayed(
        self,
        qkv: Branches,
        gates: Any,
        p: Float[Array, "B T H K"] | None,
        state: ReplayState,
        segment_ids: Int[Array, "B T"] | None,
        own: Bool[Array, "B T 1"] | None,
    ) -> tuple[Float[Array, "B T HV V"], ReplayState]:
        """Few steps, which can be taken back."""
        if segment_ids is not None or inside_shard_map(self.context_axis):
            what = "context_axis" if segment_ids is None else "segment_ids"
            raise ValueError(f"cache: expected an MDNCache with {what}, got a ReplayCache")
        of_layer = self.implementation
        return sharded_rule(
            replay_steps,
            q=qkv.q,
            k=qkv.k,
            v=qkv.v,
            **gates._asdict(),
            p=p,
            initial_state=state,
            active=own,
            implementation=None if of_layer == "triton" else of_layer,
        )

    def init_cache(
        self, batch_size: int, *, state_dtype: StateDtype = "float32", replay: int | None = None
    ) -> Any:
        """The cache before the first token.

        Args:
          batch_size: rows.
          state_dtype: how states are kept between calls.
          replay: None: an `MDNCache`; L: a `ReplayCache`, see `kept_cache`.

        Raises:
          ValueError: options that do not fit.
        """
        return self.kept_cache(super().init_cache(batch_size), state_dtype, replay)

    def kept_cache(
        self, cache: Any, state_dtype: StateDtype | None = None, replay: int | None = None
    ) -> Any:
        """A cache of this layer with its states kept in another way.

        Args:
          cache: an `MDNCache` or a `ReplayCache`.
          state_dtype: None: as they are.
          replay: None: as it is. 0: an `MDNCache`. L, 4, 8 or 16: a `ReplayCache`, whose states
            are written every L tokens, and whose last L tokens can be taken back.

        Raises:
          ValueError: options that do not fit.
        """
        state, tails = cache.state, cache[1:4]
        length = state.length if isinstance(state, ReplayState) else 0
        base = state.base if isinstance(state, ReplayState) else state
        if state_dtype in (None, kept_as(base)) and replay in (None, length):
            return cache
        whole = full(fold(state) if isinstance(state, ReplayState) else state)
        kept = keep(whole, kept_as(base) if state_dtype is None else state_dtype)
        length = length if replay is None else replay
        if length == 0:
            return MDNCache(kept, *tails)
        heads = self.config.num_heads if self.d_log is None else self.config.value_heads
        return started(replay_state(kept, length, heads=heads, dtype=self.dtype), tails)

    def _check_cache(self, cache: Any, batch: int) -> None:
        if isinstance(cache, ReplayCache):
            # as of a cache without it; the operator checks the rest
            base = cache.state.base
            cache = MDNCache(base, *cache[1:4])
        super()._check_cache(cache, batch)

    def _cache_after(
        self,
        before: Any,
        state: Any,
        qkv: Branches,
        projected: Projected,
        lengths: Int[Array, " B"] | None,
    ) -> Any:
        if not isinstance(before, ReplayCache):
            return super()._cache_after(before, state, qkv, projected, lengths)
        inputs = None
        if before.inputs is not None:
            parts = projected if isinstance(projected, tuple) else (projected,)
            inputs = jnp.concatenate(parts, axis=-1)
            if inputs.shape[1] > state.length:
                return started(state, qkv.tails)
        return advanced(before, state, qkv.tails, inputs, lengths)

    def convolved(
        self,
        projected: Projected,
        segment_ids: Int[Array, "B T"] | None,
        cache: MDNCache,
        lengths: Int[Array, " B"] | None = None,
    ) -> Branches:
        """Queries, keys and values as the rule takes them, and the new tails of the convolutions.

        With output correction `q` and `k` have value heads, `[B, T, HV, K]`.
        """
        q, k, v, tails = super().convolved(projected, segment_ids, cache, lengths)
        if self.d_log is not None:
            # The correction has a factor per value head, so its result cannot be shared by a group.
            groups = self.config.value_heads // self.config.num_heads
            q, k = (jnp.repeat(y, groups, axis=2) if groups > 1 else y for y in (q, k))
            q = _correct(q, k, self.d_log[...])
        return Branches(q, k, v, tails)


class TitansMemory(MomentumDeltaNet):
    """Token mixer with the memory of Titans, a matrix, without attention (arXiv 2501.00663).

        M_t = (1 - alpha_t) M_(t-1) + S_t
        S_t = eta_t S_(t-1) - theta_t k_t (M_(t-1)^T k_t - v_t)^T,      o_t = M_t^T q_t

    Equations 12 to 14, with the gradient as in 17, of the memory before each token (chunks of one
    token). It is the momentum delta rule with `beta = 1` and the key itself as the erase key; the
    surprise `S` is the negative of its momentum. Gates as of `TitansGates`. As in the paper, and in
    `MomentumDeltaNet`, there are short convolutions, normalised queries and keys and an output
    gate; there is no output correction. Arguments as of `StateMixer`.
    """

    def _make_gates(self, rngs: nnx.Rngs) -> None:
        self.gates = TitansGates(
            self.config.hidden_size,
            self.config.value_heads,
            initializer_range=self.config.initializer_range,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=rngs,
        )
        self.d_log = None

    @property
    def erases_decayed(self) -> bool:
        """The loss is that of the memory before it decays."""
        return False


@jax.checkpoint  # keeps its inputs, nothing wide
def _correct(
    q: Float[Array, "B T HV K"], k: Float[Array, "B T HV K"], d_log: Float[Array, " HV"]
) -> Float[Array, "B T HV K"]:
    wide = jnp.promote_types(q.dtype, jnp.float32)
    factor = jnp.exp(d_log.astype(wide))[:, None]
    return (q.astype(wide) - factor * k.astype(wide)).astype(q.dtype)
