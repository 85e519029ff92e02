"""The server's programs over rows of one generation state, a row a slot."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import NDArray

from mdn_jax.layers import sharding
from mdn_jax.models import GenerationState, SamplingArrays, initial_state
from mdn_jax.models.structure import Structure


class Rows(NamedTuple):
    """What decoding has of every row; a pytree.

    Attributes:
      state: after the tokens so far.
      left: tokens that each row may still get; 0: it is not active.
      sampling: how they are drawn.
      stop: tokens that end it; -1: none.
    """

    state: GenerationState
    left: Int[Array, " B"] | NDArray[np.int32]
    sampling: SamplingArrays
    stop: Int[Array, "B S"] | NDArray[np.int32]


class TokenScores(NamedTuple):
    """Log-probabilities (nats) at every step of a piece; a pytree.

    Attributes:
      target: of the next token.
      likeliest: the likeliest next tokens, the likeliest first.
      of_likeliest: theirs.
    """

    target: Float[Array, " T"]
    likeliest: Int[Array, "T n"]
    of_likeliest: Float[Array, "T n"]


@partial(jax.jit, static_argnums=(0, 2, 3))
def initial_rows(
    structure: Structure, arrays: list[Array], rows: int, max_length: int
) -> GenerationState:
    """Rows before their first token, with room for so many."""
    model = structure.model(arrays)
    state = initial_state(model, rows)._replace(cache=model.init_cache(rows, max_length))
    return _over_rows(state, rows)


def _over_rows[T](rows: T, count: int) -> T:
    """The same, cut over the ambient mesh's axes for the rows of a batch; heads as they are."""
    cut = sharding.cut(sharding.named_axes().rows, count)
    if cut is None:
        return rows

    def constrained(x: Array) -> Array:
        rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
        return lax.with_sharding_constraint(x, PartitionSpec(cut, *rest))

    return jax.tree.map(constrained, rows)


@partial(jax.jit, static_argnums=0, static_argnames="top", donate_argnums=2)
def read_rows(
    structure: Structure,
    arrays: list[Array],
    state: GenerationState,
    empty: GenerationState,
    slots: Int[Array, " R"] | NDArray[np.int32],
    fresh: Bool[Array, " R"] | NDArray[np.bool_],
    tokens: Int[Array, "R T"] | NDArray[np.int32],
    lengths: Int[Array, " R"] | NDArray[np.int32],
    targets: Int[Array, "1 T"] | NDArray[np.int32] | None,
    *,
    top: int,
) -> tuple[GenerationState, Array, TokenScores | None]:
    """Rows of some slots after more tokens; a slot that there is not is no row."""
    model = structure.model(arrays)

    def row_of(all_rows: Array, nothing: Array) -> Array:
        own = all_rows.at[slots].get(mode="clip")
        return jnp.where(jnp.reshape(fresh, (-1,) + (1,) * (own.ndim - 1)), nothing, own)

    before: GenerationState = jax.tree.map(row_of, state, empty)
    h, cache = model.hidden(tokens, cache=before.cache, lengths=lengths)
    last = jnp.maximum(lengths - 1, 0)
    scores = None
    if targets is None:
        logits = model.logits(jnp.take_along_axis(h, last[:, None, None], axis=1)[:, 0])
    else:
        all_logits = model.logits(h[0])
        logits = lax.dynamic_index_in_dim(all_logits, last[0], 0)
        wide = jax.nn.log_softmax(all_logits, axis=-1)
        values, ids = lax.top_k(wide, top)
        target = jnp.take_along_axis(wide, targets[0][:, None], axis=-1)[:, 0]
        scores = TokenScores(target, ids.astype(jnp.int32), values)
    own = jnp.arange(tokens.shape[1]) < lengths[:, None]
    after = GenerationState(
        cache=cache,
        logits=logits,
        seen=before.seen.at[jnp.arange(len(tokens))[:, None], tokens].max(own),
        position=before.position + lengths,
    )
    return _with_rows(state, after, slots), after.position, scores


def _with_rows[T](all_rows: T, some: T, slots: Int[Array, " R"] | NDArray[np.int32]) -> T:
    """All rows with those of some slots; of a slot that there is not nothing is kept."""

    def put(x: Array, new: Array) -> Array:
        return x.at[slots].set(new.astype(x.dtype), mode="drop", unique_indices=True)

    put_in: T = jax.tree.map(put, all_rows, some)
    return _over_rows(put_in, jax.tree.leaves(all_rows)[0].shape[0])


@partial(jax.jit, static_argnums=0)
def take_row(structure: Structure, state: GenerationState, slot: Int[Array, ""]) -> GenerationState:
    """One row."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, slot, 1, 0), state)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def place_row(
    structure: Structure,
    state: GenerationState,
    row: GenerationState,
    slot: Int[Array, ""],
) -> GenerationState:
    """All rows, with another one in a slot."""
    return _with_rows(state, row, slot[None])


_Going = tuple[Int[Array, " B"], SamplingArrays, Int[Array, "B S"]]


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def begin_rows(
    structure: Structure,
    rows: _Going,
    some: _Going,
    slots: Int[Array, " R"],
) -> _Going:
    """How rows go on, with that of some slots; no biases are zeros."""
    left, sampling, stop = some
    if sampling.bias is None:
        bias = rows[1].bias
        assert bias is not None
        sampling = sampling._replace(bias=jnp.zeros((len(slots), bias.shape[1]), bias.dtype))
    return _with_rows(rows, (left, sampling, stop), slots)


@jax.jit
def stop_row(left: Int[Array, " B"], slot: Int[Array, ""]) -> Int[Array, " B"]:
    """A row gets no more tokens."""
    return left.at[slot].set(0)


@jax.jit
def at_most(left: Int[Array, " B"], count: Int[Array, ""]) -> Int[Array, " B"]:
    """What each row gets of so many tokens."""
    return jnp.minimum(left, count)


@jax.jit
def left_after(
    left: Int[Array, " B"], counts: Int[Array, " B"], ended: Bool[Array, " B"]
) -> Int[Array, " B"]:
    """What each row may still get after a block."""
    return jnp.where(ended, 0, left - counts)
