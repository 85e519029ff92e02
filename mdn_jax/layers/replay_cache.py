"""The cache of a layer whose last tokens can be taken back."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mdn_jax.ops.replay import rewind
from mdn_jax.ops.state import ReplayState

Tail = Float[Array, "B W _"] | None


class ReplayCache(NamedTuple):
    """What a layer keeps of the tokens before; a pytree of fixed shapes.

    Attributes:
      state: states of some tokens ago and the tokens since, `L` to `2L - 1` of them.
      q_tail: the last `conv_size` outputs of `q_proj`, as in `MDNCache`.
      k_tail: the same of `k_proj`.
      v_tail: the same of `v_proj`.
      inputs: the last `2L` of all three, side by side, in the slots of the state's rings; None
        without short convolutions.
    """

    state: ReplayState
    q_tail: Tail
    k_tail: Tail
    v_tail: Tail
    inputs: Float[Array, "B 2L channels"] | None


def started(state: ReplayState, tails: tuple[Tail, Tail, Tail]) -> ReplayCache:
    """The cache of a state with no step after it.

    Args:
      state: of `replay_state`.
      tails: of the three convolutions.

    Raises:
      ValueError: a state that keeps fewer steps than the convolutions have taps.
    """
    q, k, v = tails
    if q is None or k is None or v is None:
        return ReplayCache(state, *tails, inputs=None)
    batch, size = q.shape[:2]
    if state.length < size:
        raise ValueError(f"replay: expected at least conv_size = {size}, got {state.length}")
    joined = jnp.concatenate([q, k, v], axis=-1)
    before = jnp.zeros((batch, 2 * state.length - size, joined.shape[2]), joined.dtype)
    return ReplayCache(state, *tails, inputs=jnp.concatenate([before, joined], axis=1))


def advanced(
    before: ReplayCache,
    state: ReplayState,
    tails: tuple[Tail, Tail, Tail],
    inputs: Float[Array, "B T channels"] | None,
    lengths: Int[Array, " B"] | None,
) -> ReplayCache:
    """The cache after some steps.

    Args:
      before: before them.
      state: after them.
      tails: after them.
      inputs: of the three convolutions, side by side; None without them.
      lengths: steps of each row that count; None: all.
    """
    if before.inputs is None or inputs is None:
        return ReplayCache(state, *tails, inputs=None)
    batch, length = inputs.shape[:2]
    slots, steps = before.inputs.shape[1], jnp.arange(length)
    slot = (_end(before.state)[:, None] + steps) % slots
    if lengths is not None:  # what does not count goes nowhere
        slot = jnp.where(steps < lengths[:, None], slot, slots)
    rows = jnp.arange(batch)[:, None]
    new = before.inputs.at[rows, slot].set(inputs.astype(before.inputs.dtype), mode="drop")
    return ReplayCache(state, *tails, inputs=new)


def rewound(cache: ReplayCache, steps: Int[Array, " B"]) -> ReplayCache:
    """The cache of `steps` steps ago, from 0 to `L` and to `cache.state.kept` of each row."""
    state = rewind(cache.state, steps)
    if cache.inputs is None or cache.q_tail is None or cache.k_tail is None:
        return cache._replace(state=state)
    size, slots = cache.q_tail.shape[1], cache.inputs.shape[1]
    places = (_end(state)[:, None] - size + jnp.arange(size)) % slots
    joined = jnp.take_along_axis(cache.inputs, places[:, :, None], axis=1)
    keys = cache.q_tail.shape[2], cache.q_tail.shape[2] + cache.k_tail.shape[2]
    q, k, v = jnp.split(joined, keys, axis=2)
    return ReplayCache(state, q, k, v, cache.inputs)


def _end(state: ReplayState) -> Int[Array, " B"]:
    """The slot of the next step."""
    return (state.counts[:, 0, 0] + state.counts[:, 0, 1]) % state.keys.shape[2]
