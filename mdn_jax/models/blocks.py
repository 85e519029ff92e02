"""The compiled loop of single tokens: a block of them for every row of a batch."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import NDArray

from mdn_jax.layers.attention import AttentionCache
from mdn_jax.models.arguments import is_whole
from mdn_jax.models.causal_lm import MDNForCausalLM, ModelCache
from mdn_jax.models.fields import require
from mdn_jax.models.fused import fused_cache_lacks
from mdn_jax.models.generation_state import GenerationState, check_state
from mdn_jax.models.sampling import SamplingArrays, draw, needed
from mdn_jax.models.steps import LayerStructure, StepKind, fused_steps


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


class Decoder:
    """A model ready to take single tokens; its parameters are those at this time.

    Args:
      model: the model.
      steps: of single tokens: "layers", the model's own; "fused", the GPU kernels of
        `pallas_kernels.decoding`; None: those where they support the model.

    Raises:
      ValueError: "fused" for a model that the kernels do not support, with what they expect.
    """

    def __init__(self, model: MDNForCausalLM, steps: StepKind | None = None) -> None:
        self.model = model
        graph, self._weights = nnx.split(model)
        self._layers = LayerStructure(graph)
        self._fused = fused_steps(model, steps)

    def _steps_of(self, cache: ModelCache) -> tuple[Any, Any]:
        if self._fused is None or fused_cache_lacks(cache):
            return self._layers, self._weights
        return self._fused

    def block(
        self,
        state: GenerationState,
        limits: Int[Array, " B"] | NDArray[np.int32],
        sampling: SamplingArrays,
        stop: Int[Array, "B S"] | NDArray[np.int32],
        *,
        size: int = 16,
        logprobs: int | None = None,
        donate: bool = False,
    ) -> Block:
        """Up to `size` tokens of every row, by one call of a compiled loop.

        What decides on the tokens is data: another limit, temperature, seed or stop token compiles
        nothing. A program belongs to the shapes (rows, `S`, room of attention caches), `size`,
        `logprobs`, `donate`, and whether there are biases. The loop ends when no row goes on.

        Args:
          state: attention caches without a window must have room for the tokens
            (`init_cache(rows, max_length)`, or `with_room`), else they forget the oldest.
          limits: most tokens that each row gets; 0: the row is not active, and stays as it is.
          sampling: how tokens are drawn, of `sampling_arrays`.
          stop: tokens that end a row, of `stop_array`.
          size: tokens in the block.
          logprobs: None: none; n: of what was drawn and of the n likeliest.
          donate: the state's memory is used for the new one's; the state given is lost.

        Raises:
          ValueError: a state of another model, or options that do not fit, by name.
        """
        check_state(self.model, state)
        for entry in state.cache:
            if isinstance(entry, AttentionCache) and entry.capacity is None:
                raise ValueError(
                    "state: expected attention caches of a fixed size (of with_room), "
                    "got one that grows"
                )
        require("size", size, "an int >= 1", is_whole(size, 1))
        vocab = self.model.config.vocab_size
        fits = logprobs is None or (is_whole(logprobs, 0) and logprobs <= vocab)
        require("logprobs", logprobs, f"an int from 0 to {vocab} or None", fits)
        run = _decode_in_place if donate else _decode_copy
        structure, arrays = self._steps_of(state.cache)
        return run(structure, arrays, state, limits, sampling, stop, size=size, logprobs=logprobs)


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


def _decode_block(
    structure: Any,
    weights: Any,
    state: GenerationState,
    limits: Int[Array, " B"],
    sampling: SamplingArrays,
    stop: Int[Array, "B S"],
    *,
    size: int,
    logprobs: int | None,
) -> Block:
    steps = structure.steps(weights)
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
        )
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


_decode_copy = partial(jax.jit, static_argnums=0, static_argnames=("size", "logprobs"))(
    _decode_block
)
_decode_in_place = partial(
    jax.jit, static_argnums=0, static_argnames=("size", "logprobs"), donate_argnames="state"
)(_decode_block)


def _logprobs(logits: Float[Array, "B vocab"], token: Int[Array, " B"], n: int) -> Logprobs:
    """Of one step."""
    wide = jax.nn.log_softmax(logits, axis=-1)
    drawn = jnp.take_along_axis(wide, token[:, None], axis=-1)[:, 0]
    values, ids = lax.top_k(wide, n) if n else (wide[:, :0], jnp.zeros(wide[:, :0].shape, int))
    return Logprobs(drawn, ids.astype(jnp.int32), values)
