"""Tokens outside the vocabulary: nan from there to the end of their document, and nowhere else.

The blocks get another token in their place, so that whatever a product of matrices carries to other
steps is finite; the outputs and the cache are marked afterwards. So the mark is the same on every
path, and neither a step before nor another document has it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mdn_jax.layers.arguments import without_padding
from mdn_jax.layers.attention import AttentionCache
from mdn_jax.layers.context import own_stretch, whole_rows
from mdn_jax.ops.arguments import outside
from mdn_jax.ops.context import of_last_device
from mdn_jax.ops.state import ReplayState


def split_unknown(
    tokens: Int[Array, "B T"], vocab_size: int, lengths: Int[Array, " B"] | None
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Ids that are all in the vocabulary, int32, and which tokens are not; padding is neither.

    Args:
      tokens: any ids of any integer dtype.
      vocab_size: tokens in the vocabulary.
      lengths: tokens of each row that count; None: all.
    """
    unknown = outside(tokens, vocab_size)
    ids = without_padding(jnp.where(unknown, 0, tokens).astype(jnp.int32), lengths)
    return ids, without_padding(jnp.asarray(unknown), lengths)


def marks(
    unknown: Bool[Array, "B T"],
    documents: Int[Array, "B T"] | None,
    dtype: jax.typing.DTypeLike,
    axis: str | None = None,
) -> tuple[Array, Array]:
    """`[B, T]` of nan at the unknown tokens and what follows them in their document, else zeros.

    Args:
      unknown: which tokens are not in the vocabulary.
      documents: of each token, numbered along the row; None: one.
      dtype: of the marks.
      axis: mesh axis over which the tokens of a row are cut; None: rows are whole.

    Returns:
      The marks, and those of the row's last token, `[B]`.
    """
    steps = unknown.shape[1]
    if axis is not None:
        unknown, documents = whole_rows((unknown, documents), axis)
    numbers = 0 if documents is None else documents
    latest = jax.lax.cummax(jnp.where(unknown, numbers, -1), axis=1)  # document of the last one
    nans = jnp.where(latest == numbers, jnp.nan, 0.0).astype(dtype)
    if axis is None:
        return nans, nans[:, -1]
    return own_stretch(nans, axis, steps), of_last_device(nans[:, -1], axis)


def marked_cache(cache: Any, marks: Array) -> Any:
    """A layer's cache with the marks `[B]` in it: what goes on from a nan is nan.

    One entry of a state, or the newest value of softmax attention, is enough and costs nothing.
    """
    if isinstance(cache, AttentionCache):
        if not cache.v.shape[1]:
            return cache
        v = cache.v.at[:, -1].add(marks.astype(cache.v.dtype)[:, None, None])
        return dataclasses.replace(cache, v=v)

    def marked(x: Array) -> Array:
        return x.at[(slice(None), *(0,) * (x.ndim - 1))].add(marks.astype(x.dtype))

    if isinstance(cache.state, ReplayState):
        return cache._replace(state=_marked_steps(cache.state, marks))
    return cache._replace(state=jax.tree.map(marked, cache.state))


def _marked_steps(state: ReplayState, marks: Array) -> ReplayState:
    """The mark in what the last step wrote, so that it can be taken back; or in the base."""
    first, kept = state.counts[:, 0, 0], state.counts[:, 0, 1]
    rows, last = jnp.arange(marks.shape[0]), (first + kept - 1) % state.keys.shape[2]
    steps = jnp.where(kept > 0, marks, 0).astype(state.v_new.dtype)
    s = state.base.s.at[:, 0, 0, 0].add(jnp.where(kept > 0, 0, marks).astype(state.base.s.dtype))
    return state._replace(
        base=state.base._replace(s=s), v_new=state.v_new.at[rows, 0, last, 0].add(steps)
    )
