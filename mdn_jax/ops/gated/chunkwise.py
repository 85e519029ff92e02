"""The chunk algorithm of the gated rules in plain XLA, on any device.

Time is cut into blocks of chunks. In a block, what does not need the entering states is computed
for all chunks at once, a scan over chunks does what is sequential, and the outputs follow for all
at once. The backward pass keeps one state a block and runs each block again.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mdn_jax.ops.chunk_states import unit_lower_inverse
from mdn_jax.ops.chunkwise import default_chunk_size, largest_block
from mdn_jax.ops.gated.chunk import prepare_chunk
from mdn_jax.ops.gated.inputs import GatedInputs
from mdn_jax.ops.inputs import pad_time, split_time


def chunkwise_gated(
    inputs: GatedInputs,
    state: Float[Array, "B H G K V"],
    *,
    delta: bool,
    scale: float | Array,
    chunk_size: int | None,
    precision: lax.Precision,
) -> tuple[Array, Array]:
    """Runs a rule chunk by chunk.

    Args:
      inputs: prepared inputs, in the dtype to compute in.
      state: entering state.
      delta: with the delta rule.
      scale: factor on the output.
      chunk_size: steps in a chunk; None: 32 on a CPU, 64 elsewhere. A shorter sequence is one chunk
        of its own length.
      precision: of the products with K- and V-sized operands; decays are always exact.

    Returns:
      Outputs `[B, T, H, G, V]` and the final state.
    """
    length = inputs.v.shape[1]
    chunk = min(chunk_size or default_chunk_size(), length)
    chunks = -(-length // chunk)
    blocks = -(-chunks // max(1, largest_block() // chunk))
    block = -(-chunks // blocks) * chunk  # even blocks: the least padding
    inputs = pad_time(inputs._replace(q=scale * inputs.q), blocks * block - length)
    run = partial(_block, chunk=chunk, delta=delta, precision=precision)
    state, o = lax.scan(jax.checkpoint(run, prevent_cse=False), state, split_time(inputs, block))
    o = jnp.moveaxis(o, 0, 1)
    return o.reshape(o.shape[0], blocks * block, *o.shape[3:])[:, :length], state


def _block(
    state: Float[Array, "B H G K V"],
    inputs: GatedInputs,
    *,
    chunk: int,
    delta: bool,
    precision: lax.Precision,
) -> tuple[Array, Array]:
    """The chunks of one block: the next state and the outputs `[B, T, H, G, V]`."""
    matmul = partial(jnp.matmul, precision=precision)
    x = _heads_first(split_time(inputs, chunk))
    chunks = prepare_chunk(x, delta=delta, precision=precision)
    write = jnp.swapaxes(chunks.write, -1, -2)

    def advance(state: Array, x: tuple[Array, Array]) -> tuple[Array, Array]:
        written, keep = x
        return keep * state + written, state

    def correct(state: Array, x: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        v, inverse, read, write, keep = x
        update = matmul(inverse, v - matmul(read, state))
        return keep * state + matmul(write, update), (state, update)

    if chunks.lower is None or chunks.read is None:
        update = x.v
        state, entering = lax.scan(advance, state, (matmul(write, update), chunks.keep))
    else:
        inverse = unit_lower_inverse(chunks.lower)
        steps = (x.v, inverse, chunks.read, write, chunks.keep)
        state, (entering, update) = lax.scan(correct, state, steps)
    o = matmul(chunks.query, entering) + matmul(chunks.attention, update)  # [NT, B, H, G, C, V]
    return state, o.transpose(1, 0, 4, 2, 3, 5).reshape(inputs.v.shape)


def _heads_first(chunks: GatedInputs) -> GatedInputs:
    """`[NT, B, C, heads..., ...] -> [NT, B, heads..., C, ...]`; `q`, `k` get an axis for `G`."""

    def first(x: Array) -> Array:
        return jnp.moveaxis(x, 2, 4)

    return chunks._replace(
        q=jnp.moveaxis(chunks.q, 2, 3)[:, :, :, None],
        k=jnp.moveaxis(chunks.k, 2, 3)[:, :, :, None],
        v=first(chunks.v),
        log_alpha=first(chunks.log_alpha),
        beta=first(chunks.beta),
        p=None if chunks.p is None else first(chunks.p),
        erase=None if chunks.erase is None else first(chunks.erase),
        own=None if chunks.own is None else first(chunks.own),
    )
