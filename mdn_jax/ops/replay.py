"""Decoding that writes the states every L steps and can go back: the steps since are kept.

The states of some steps ago, S0 and M0, stay as they are. What was done since, keys, written values
and gates, gives every later output (docs/algorithm.md, section 7). Every L steps the oldest L are
applied to the states, by the recurrence itself. Nothing is divided, so that any gates will do.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mdn_jax.ops.api import kernels_lack
from mdn_jax.ops.arguments import check_momentum_rule, check_options
from mdn_jax.ops.context import varying
from mdn_jax.ops.inputs import L2_EPSILON, compute_dtype, l2_normalize
from mdn_jax.ops.state import (
    CompactState,
    Kept,
    MDNState,
    ReplayState,
    full,
    keep,
    kept_as,
)

ReplayImplementation = Literal["scan", "xla", "pallas_triton"]

_SHORTER = 2.0**-30  # keys of up to 2^86 have a norm in float32 then
_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def replay_state(
    state: Kept, length: int, *, heads: int | None = None, dtype: jax.typing.DTypeLike = jnp.float32
) -> ReplayState:
    """A state with no step after it.

    Args:
      state: states, which become the base as they are.
      length: steps between two writes, `L`: a power of two from 2 to 16.
      heads: key heads; None: as many as value heads.
      dtype: of the keys that will come.

    Raises:
      ValueError: another `length`.
    """
    check_replay(length)
    batch, value_heads, key_dim, value_dim = state.s.shape
    wide = full(state).s.dtype
    rows = (batch, value_heads)
    return ReplayState(
        base=state,
        keys=jnp.zeros((batch, heads or value_heads, 2 * length, key_dim), dtype),
        v_new=jnp.zeros((*rows, 2 * length, value_dim), wide),
        gates=jnp.zeros((*rows, 2 * length, 4), wide),
        counts=jnp.zeros((*rows, 2), jnp.int32),
    )


def check_replay(length: Any) -> None:
    """Raises ValueError unless `length` is a power of two from 2 to 16."""
    if length not in (2, 4, 8, 16) or isinstance(length, bool):
        raise ValueError(f"replay: expected 2, 4, 8 or 16, got {length!r}")


def fold(state: ReplayState) -> Kept:
    """The states after all steps, kept as the base is."""
    return _applied(state, state.counts[..., 1])


def rewind(state: ReplayState, steps: int | Int[Array, " B"]) -> ReplayState:
    """The state of `steps` steps ago: they are forgotten, and nothing is computed.

    Args:
      state: of `replay_steps`.
      steps: of all rows, or of each, from 0 to `state.kept`.

    Raises:
      ValueError: more steps than are kept (where the numbers are known), or fewer than 0.
    """
    back = jnp.broadcast_to(jnp.asarray(steps, jnp.int32), state.kept.shape)
    if not isinstance(back, jax.core.Tracer) and not isinstance(state.kept, jax.core.Tracer):
        for row, (n, kept) in enumerate(zip(np.asarray(back), np.asarray(state.kept), strict=True)):
            if not 0 <= n <= kept:
                raise ValueError(f"steps: expected 0 to {kept} in row {row}, got {n}")
    return state._replace(counts=state.counts.at[..., 1].add(-back[:, None]))


def replay_steps(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    log_alpha: Float[Array, "B T HV"],
    log_mu: Float[Array, "B T HV"],
    beta: Float[Array, "B T HV"],
    eta: Float[Array, "B T HV"],
    *,
    initial_state: ReplayState,
    p: Float[Array, "B T _ K"] | None = None,
    scale: float | None = None,
    active: Bool[Array, "B T 1"] | None = None,
    segment_ids: None = None,
    normalize_qk: bool = True,
    implementation: ReplayImplementation | None = None,
) -> tuple[Float[Array, "B T HV V"], ReplayState]:
    """`momentum_delta_rule`, one step after another, with states written every L steps.

    Arrays as of `momentum_delta_rule`; keys of the dtype that `replay_state` was given. Not
    differentiable.

    Args:
      q: queries.
      k: keys.
      v: values.
      log_alpha: log of the decay.
      log_mu: log of the momentum.
      beta: step size.
      eta: write scale.
      initial_state: of `replay_state` or of the call before.
      p: erase key.
      scale: factor on the output; None means `K ** -0.5`.
      active: steps that count; the others have meaningless outputs and leave no trace. None: all.
      segment_ids: None: no document starts here.
      normalize_qk: l2-normalise `q` and `k`.
      implementation: "pallas_triton", two kernels a step (CUDA GPUs; K a power of two from 16, V a
        power of two up to 128 or a multiple of it); "xla" or "scan", everywhere; None: the
        kernels where they support the call.

    Returns:
      The outputs in `v`'s dtype and the state after.

    Raises:
      ValueError: a shape, a value or an implementation that does not fit.
      TypeError: a dtype or type that does not fit.
    """
    state = initial_state
    if not isinstance(state, ReplayState):
        raise TypeError(f"initial_state: expected a ReplayState, got {type(state).__name__}")
    if segment_ids is not None:
        raise ValueError("segment_ids: expected None with a ReplayState, got an array")
    check_momentum_rule(q, k, v, log_alpha, log_mu, beta, eta, p, state.base, None)
    check_options(scale, None, implementation, ("scan", "xla", "pallas_triton"))
    if state.keys.dtype != k.dtype or state.keys.shape[1] != k.shape[2]:
        raise TypeError(
            f"k: expected {state.keys.shape[1]} heads of {state.keys.dtype.name} (as in the state),"
            f" got {k.shape[2]} of {k.dtype.name}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kernel = _kernel(implementation, q, v, p, scale)
    compute = compute_dtype(q)
    gates = [jnp.asarray(x, compute) for x in (log_alpha, log_mu, beta, eta)]
    if active is None:
        active = jnp.ones((*q.shape[:2], 1), bool)
    step = partial(kernel or _step, scale=scale, normalize=normalize_qk)
    inputs = ((q, k, v, p, *gates), active)
    if q.shape[1] == 1:
        state, o = step(state, jax.tree.map(lambda x: x[:, 0], inputs))
        return o[:, None], state
    time_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)
    state, o = lax.scan(step, state, time_first)
    return jnp.moveaxis(o, 0, 1), state


def _kernel(implementation: str | None, q: Array, v: Array, p: Array | None, scale: Any) -> Any:
    """The step on the kernel; None: not there.

    Raises:
      ValueError: it is asked for and does not support the call.
    """
    if implementation in ("scan", "xla"):
        return None
    lacking = kernels_lack("pallas_triton", q, v, p, scale, None)
    if lacking is None:
        from pallas_kernels.tiling import padded_key_dim, padded_value_dim

        dims = q.shape[-1], v.shape[-1]
        padded = padded_key_dim(dims[0]), padded_value_dim(dims[1])
        if dims != padded:
            lacking = f"K, V such as {padded[0]}, {padded[1]}, got {dims[0]}, {dims[1]}"
    if lacking is None:
        from mdn_jax.ops.kernels import kernel_replay

        return kernel_replay
    if implementation is not None:
        raise ValueError(
            f'implementation: "{implementation}" expects {lacking}; use implementation="xla", or '
            "None for the best one that supports the call"
        )
    return None


class _Coefficients(NamedTuple):
    """Of S0 and -M0 in S (`a`, `b`), of M0 in M (`m`), of the writes in -M and S (`w`, `g`)."""

    a: Float[Array, "B HV"]
    b: Float[Array, "B HV"]
    m: Float[Array, "B HV"]
    w: Float[Array, "B HV 2L"]
    g: Float[Array, "B HV 2L"]

    def after(self, alpha: Array, mu: Array, beta: Array) -> "_Coefficients":
        """One step more, its own write apart."""
        m, w = mu * self.m, mu[..., None] * self.w
        g = alpha[..., None] * self.g + beta[..., None] * w
        return _Coefficients(alpha * self.a, alpha * self.b + beta * m, m, w, g)


def _walked(state: ReplayState) -> _Coefficients:
    """The coefficients of all steps that are kept, by one after another."""
    kept, slots = state.counts[..., 1], state.keys.shape[2]
    one = jnp.ones(kept.shape, state.gates.dtype)
    none = jnp.zeros((*kept.shape, slots), one.dtype)

    def step(i: Array, c: _Coefficients) -> _Coefficients:
        slot = (state.counts[..., 0] + i) % slots
        alpha, mu, beta, eta = jnp.moveaxis(_at(state.gates, slot), -1, 0)
        after = c.after(alpha, mu, beta)
        w = jnp.where(jnp.arange(slots) == slot[..., None], eta[..., None], after.w)
        after = after._replace(w=w, g=alpha[..., None] * c.g + beta[..., None] * w)
        there = i < kept
        return jax.tree.map(
            lambda new, old: jnp.where(
                there.reshape(*kept.shape, *(1,) * (new.ndim - 2)), new, old
            ),
            after,
            c,
        )

    none_yet = varying(_Coefficients(one, 0 * one, one, none, none), state.gates)
    return lax.fori_loop(0, slots - 1, step, none_yet)


def _at(ring: Float[Array, "B HV 2L X"], slot: Int[Array, "B HV"]) -> Float[Array, "B HV X"]:
    """What a ring has at each head's slot."""
    return jnp.take_along_axis(ring, slot[..., None, None], axis=2)[:, :, 0]


def _step(
    state: ReplayState, x: tuple[Any, Array], *, scale: float | Array, normalize: bool
) -> tuple[ReplayState, Array]:
    """One step anywhere: of arrays `[B, ...]`."""
    (q, k, v, p, log_alpha, log_mu, beta, eta), active = x
    groups, wide, value_dtype = v.shape[1] // k.shape[1], log_alpha.dtype, v.dtype
    raw, v = k.astype(wide), v.astype(wide)
    q = l2_normalize(q.astype(wide)) if normalize else q.astype(wide)
    inverse = _inverse_norm(raw) if normalize else jnp.ones(raw.shape[:2], wide)
    alpha, mu = jnp.exp(log_alpha), jnp.exp(log_mu)
    q, by_head, inverse = (jnp.repeat(y, groups, axis=1) for y in (q, raw, inverse))
    eta = eta * inverse
    if p is None:
        p = (alpha * inverse)[..., None] * by_head
    else:
        p = jnp.repeat(p.astype(wide), v.shape[1] // p.shape[1], axis=1)

    before = _walked(state)
    after = before.after(alpha, mu, beta)
    keys = jnp.repeat(state.keys.astype(wide), groups, axis=1)

    def of_ring(y: Array, g: Array) -> Array:
        weight = _times(g, _einsum("bhck,bhk->bhc", keys, y))
        return jnp.sum(_times(weight[..., None], state.v_new), axis=2)

    s, m = full(state.base)
    whole = _times(before.a[..., None, None], s) - _times(before.b[..., None, None], m)
    seen = _einsum("bhkv,bhk->bhv", whole, p) + of_ring(p, before.g)
    dead = ((alpha == 0) & (mu == 0))[..., None]
    seen = jnp.where(dead & ~jnp.isfinite(seen), 0.0, seen)
    v_new = v - seen
    whole = _times(alpha[..., None, None], whole)
    whole -= _times((beta * after.m)[..., None, None], m)
    o = _einsum("bhkv,bhk->bhv", whole, q) + of_ring(q, after.g)
    o += (beta * eta * jnp.sum(by_head * q, axis=-1))[..., None] * v_new
    state = _with_room(state)
    return _appended(state, k, v_new, (alpha, mu, beta, eta), active), (scale * o).astype(
        value_dtype
    )


def _appended(
    state: ReplayState,
    k: Array,
    v_new: Array,
    gates: tuple[Array, ...],
    active: Bool[Array, "B 1"],
) -> ReplayState:
    slots = state.keys.shape[2]
    slot = (state.counts[..., 0] + state.counts[..., 1]) % slots
    groups = state.counts.shape[1] // k.shape[1]

    def put(ring: Array, new: Array, slot: Array) -> Array:
        here = (jnp.arange(slots) == slot[..., None])[..., None]
        return jnp.where(here, new[:, :, None].astype(ring.dtype), ring)

    return state._replace(
        keys=put(state.keys, k, slot[:, ::groups]),
        v_new=put(state.v_new, v_new, slot),
        gates=put(state.gates, jnp.stack(gates, axis=-1), slot),
        counts=state.counts.at[..., 1].add(active.astype(jnp.int32)),
    )


def _with_room(state: ReplayState) -> ReplayState:
    """With the oldest half applied to the base in rows whose ring is full."""
    length, slots = state.length, state.keys.shape[2]
    due = jnp.where(state.counts[..., 1] == slots - 1, length, 0)

    def apply(state: ReplayState) -> ReplayState:
        first = (state.counts[..., 0] + due) % slots
        counts = jnp.stack([first, state.counts[..., 1] - due], axis=-1)
        return state._replace(base=_applied(state, due), counts=counts)

    return lax.cond(jnp.any(due > 0), apply, lambda state: state, state)


def _applied(state: ReplayState, count: Int[Array, "B HV"]) -> Kept:
    """The base after each head's `count` oldest steps; where that is 0, as it is."""
    slots, wide = state.keys.shape[2], state.gates.dtype
    groups = state.counts.shape[1] // state.keys.shape[1]

    def step(i: Array, states: MDNState) -> MDNState:
        slot = (state.counts[..., 0] + i) % slots
        alpha, mu, beta, eta = (
            y[..., None, None] for y in jnp.moveaxis(_at(state.gates, slot), -1, 0)
        )
        k = jnp.repeat(_at(state.keys, slot[:, ::groups]).astype(wide), groups, axis=1)
        write = eta * k[..., None] * _at(state.v_new, slot)[:, :, None]
        m = _times(mu, states.m) - write
        s = _times(alpha, states.s) - beta * m
        there = (i < count)[..., None, None]
        return MDNState(jnp.where(there, s, states.s), jnp.where(there, m, states.m))

    after = keep(lax.fori_loop(0, jnp.max(count), step, full(state.base)), kept_as(state.base))
    if not isinstance(state.base, CompactState):
        return after
    moved = count > 0  # the others are not rounded again

    def select(new: Array, old: Array) -> Array:
        return jnp.where(moved.reshape(*moved.shape, 1, 1), new, old)

    chosen: CompactState = jax.tree.map(select, after, state.base)
    return chosen


def _inverse_norm(x: Float[Array, "B H K"]) -> Float[Array, "B H"]:
    """`1 / sqrt(sum(x^2) + 1e-6)`."""
    short = _SHORTER * x
    return _SHORTER * lax.rsqrt(jnp.sum(short * short, axis=-1) + _SHORTER**2 * L2_EPSILON)


def _times(factor: Array, x: Array) -> Array:
    """Zero for a factor of zero, whatever `x` is."""
    return jnp.where(factor == 0, 0.0, factor * x)
