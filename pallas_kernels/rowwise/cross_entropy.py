"""Cross entropy of logits and its gradient by them (`cross_entropy_fwd`).

Computes, for every row n with target t and z = log sum_v exp(logits_v) over the vocabulary:

    loss = z - logits_t,      d_logits_v = exp(logits_v - z) - [v = t]

    inputs   logits [N, V] float32, of which the first `vocab` columns count; targets [N] int32
    outputs  loss [N] float32; d_logits [N, V], zero behind `vocab`, in the dtype asked for
    grid     N: a row a program

Why so: bytes are all that it costs. One walk along the row keeps the largest logit and the sum of
exponentials of each lane, a second one writes the gradient. Programs are as large as they can be,
so that one runs on a multiprocessor: the rows of all of them, 27 MB for the vocabulary of GPT-2,
are still in the second-level cache when they are read again.

Constraints: none on `V`; rows that are a multiple of 16 bytes apart are read 16 bytes at a time.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import kernel_call, masked_load, masked_store

_COLUMNS = 4096
"""Of a block, those of 32 warps: as many as a program may have."""
_OF_A_WARP = 128
"""Four a lane."""
_UNROLL = 4
"""Loads that are issued together."""
_LOWEST = -1e30
"""Below every logit that counts, and finite: `-inf - -inf` is none."""


def cross_entropy_fwd(
    logits: jax.Array,
    targets: jax.Array,
    *,
    vocab: int,
    ignored: int,
    unknown: int,
    dtype: jax.typing.DTypeLike,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The loss of every row, nats, and its gradient by the logits. Not differentiable.

    Args:
      logits: `[N, V]` float32.
      targets: `[N]` int32, columns.
      vocab: columns that count; those behind are taken as -inf.
      ignored: a target whose loss and gradient are zero.
      unknown: a target whose loss and gradient are nan.
      dtype: of the gradient.
      interpret: run the kernel in the interpreter, on any device.

    Returns:
      Loss `[N]` float32 and gradient `[N, V]`.
    """
    rows, width = logits.shape
    columns = min(_COLUMNS, pl.next_power_of_2(width))
    shapes = jax.ShapeDtypeStruct((rows,), jnp.float32), jax.ShapeDtypeStruct((rows, width), dtype)
    body = partial(
        _body,
        columns=columns,
        unroll=min(_UNROLL, pl.cdiv(width, columns)),
        vocab=vocab,
        ignored=ignored,
        unknown=unknown,
    )
    loss, gradient = kernel_call(
        body,
        logits,
        targets,
        name="cross_entropy_fwd",
        grid=(rows,),
        in_specs=[pl.BlockSpec(), pl.BlockSpec()],
        out_specs=(pl.BlockSpec(), pl.BlockSpec()),
        out_shape=shapes,
        warps=max(columns // _OF_A_WARP, 1),
        stages=1,
        interpret=interpret,
    )
    return loss, gradient


def _body(
    logits: Any,
    targets: Any,
    out: Any,
    *,
    columns: int,
    unroll: int,
    vocab: int,
    ignored: int,
    unknown: int,
) -> None:
    row, lane = pl.program_id(0), lax.broadcasted_iota(jnp.int32, (columns,), 0)
    target = targets[row]
    width = logits.shape[1]
    rounds = pl.cdiv(width, columns * unroll)

    def blocks(i: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        """Columns and logits of a round."""
        places = [(i * unroll + j) * columns + lane for j in range(unroll)]
        loaded = [masked_load(logits.at[row, place], place < vocab) for place in places]
        return [
            (place, jnp.where(place < vocab, x, _LOWEST))
            for place, x in zip(places, loaded, strict=True)
        ]

    def gather(
        i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        most, total, at_target = carry
        own = blocks(i)
        new = most
        for _, x in own:
            new = jnp.maximum(new, x)
        total *= jnp.exp(most - new)
        for place, x in own:
            total += jnp.exp(x - new)
            at_target += jnp.where(place == target, x, 0.0)
        return new, total, at_target

    lowest, zeros = jnp.full((columns,), _LOWEST), jnp.zeros((columns,))
    most, total, at_target = lax.fori_loop(0, rounds, gather, (lowest, zeros, zeros))
    peak = jnp.max(most)
    z = peak + jnp.log(jnp.sum(total * jnp.exp(most - peak)))
    z = jnp.where(target == unknown, jnp.nan, z)
    out[0][row] = jnp.where(target == ignored, 0.0, z - jnp.sum(at_target))

    def write(i: jax.Array, carry: None) -> None:
        for place, x in blocks(i):
            gradient = jnp.exp(x - z) - jnp.where(place == target, 1.0, 0.0)
            gradient = jnp.where(target == ignored, 0.0, gradient)
            masked_store(out[1].at[row, place], gradient.astype(out[1].dtype), place < width)
        return carry

    lax.fori_loop(0, rounds, write, None)
