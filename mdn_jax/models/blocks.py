"""The compiled loop of single tokens: a block of them for every row of a batch."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import NDArray

from mdn_jax.models.fused import FusedStructure
from mdn_jax.models.generation_state import GenerationState
from mdn_jax.models.kept_states import remembered
from mdn_jax.models.sampling import SamplingArrays, draw, needed
from mdn_jax.models.structure import Structure


class Logprobs(NamedTuple):
    """Log-probabilities (nats) of the model's own distribution; a pytree.

    That is the log-softmax of the logits in float32 (float64 for float64) over the whole
    vocabulary, before limit, bias, penalty, temperature and filters.

    Attributes:
      drawn: of the tokens drawn.
      likeliest: the `n` likeliest tokens, the likeliest first, ties in the order of the ids.
      of_likeliest: theirs.
    """

    drawn: Float[Array, "B N"]
    likeliest: Int[Array, "B N n"]
    of_likeliest: Float[Array, "B N n"]


class Block(NamedTuple):
    """Some more tokens of every row; a pytree.

    Attributes:
      tokens: the first `counts` of a row are its new ones; -1, the last, where the logits had nan
        or inf and nothing could be drawn.
      counts: how many tokens each row got.
      ended: rows whose last token is a stop token, or -1.
      state: after these tokens; of a row that got none it is as before.
      logprobs: of the tokens; None where not asked for.
    """

    tokens: Int[Array, "B N"]
    counts: Int[Array, " B"]
    ended: Bool[Array, " B"]
    state: GenerationState
    logprobs: Logprobs | None


def stop_array(stop_tokens: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """Stop tokens of every row as an array `[B, S]`, behind them -1; `S` is 8, 16, 32, ..."""
    longest = max(map(len, stop_tokens), default=0)
    array = np.full((len(stop_tokens), max(8, 1 << (longest - 1).bit_length())), -1, np.int32)
    for row, tokens in zip(array, stop_tokens, strict=True):
        row[: len(tokens)] = tokens
    return array


class _Carry(NamedTuple):
    block: Block
    step: Int[Array, ""]


def _block(
    structure: Structure | FusedStructure,
    arrays: Any,
    state: GenerationState,
    limits: Int[Array, " B"],
    sampling: SamplingArrays,
    stop: Int[Array, "B S"],
    *,
    size: int,
    logprobs: int | None,
) -> Block:
    steps: Any = structure.steps(arrays)  # what they keep in place of a cache is their own
    batch = limits.shape[0]
    rows = jnp.arange(batch)
    need = needed(sampling, limits > 0)

    def active(carry: _Carry) -> Array:
        return ~carry.block.ended & (carry.step < limits)

    def step(carry: _Carry) -> _Carry:
        block, own = carry.block, active(carry)
        before = block.state
        drawn = draw(before.logits, before.seen, before.position, sampling, need)
        token = jnp.maximum(drawn, 0)
        # a single row leaves the loop when it ends, and needs no mask
        logits, memory = steps.step(before.cache, token, own if batch > 1 else None)
        after = GenerationState(
            cache=memory,
            logits=jnp.where(own[:, None], logits, before.logits),
            seen=before.seen.at[rows, token].max(own),
            position=before.position + own,
            recent=before.recent,
        )
        after = remembered(before, after, token, own)
        stopped = jnp.any(token[:, None] == stop, axis=-1) | (drawn < 0)
        now = None if block.logprobs is None else _logprobs(before.logits, token, logprobs or 0)
        block = Block(
            tokens=block.tokens.at[:, carry.step].set(drawn),
            counts=block.counts + own,
            ended=block.ended | (own & stopped),
            state=after,
            logprobs=jax.tree.map(lambda x, y: x.at[:, carry.step].set(y), block.logprobs, now),
        )
        return _Carry(block, carry.step + 1)

    numbers = jnp.zeros((batch, size, 1 + (logprobs or 0)), state.logits.dtype)
    ids = jnp.zeros(numbers.shape, jnp.int32)
    start = Block(
        tokens=ids[:, :, 0],
        counts=jnp.zeros((batch,), jnp.int32),
        ended=jnp.zeros((batch,), bool),
        state=state._replace(cache=steps.enter(state.cache)),
        logprobs=None
        if logprobs is None
        else Logprobs(numbers[:, :, 0], ids[:, :, 1:], numbers[:, :, 1:]),
    )

    def goes_on(carry: _Carry) -> Array:
        return (carry.step < size) & jnp.any(active(carry))

    made = lax.while_loop(goes_on, step, _Carry(start, jnp.zeros((), jnp.int32))).block
    return made._replace(state=made.state._replace(cache=steps.leave(made.state.cache)))


GRAPHS = {
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    ),
    "xla_gpu_graph_min_graph_size": 1,
}
"""Options of XLA with which the loop is one CUDA graph: the host waits for no token."""


@cache
def decode_block(*, in_place: bool, graphs: bool) -> Any:
    """The compiled loop: of structure, arrays, state, limits, sampling and stop tokens a `Block`.

    Args:
      in_place: the state's memory is used for the new one's.
      graphs: on a GPU, as one CUDA graph.
    """
    return jax.jit(
        _block,
        static_argnums=0,
        static_argnames=("size", "logprobs"),
        donate_argnames="state" if in_place else None,
        compiler_options=GRAPHS if graphs else None,
    )


def _logprobs(logits: Float[Array, "B vocab"], token: Int[Array, " B"], n: int) -> Logprobs:
    """Of one step."""
    wide = jax.nn.log_softmax(logits, axis=-1)
    drawn = jnp.take_along_axis(wide, token[:, None], axis=-1)[:, 0]
    values, ids = lax.top_k(wide, n) if n else (wide[:, :0], jnp.zeros(wide[:, :0].shape, int))
    return Logprobs(drawn, ids.astype(jnp.int32), values)
