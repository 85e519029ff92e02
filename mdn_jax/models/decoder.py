"""A model taken apart once for many calls of compiled programs."""

import contextlib
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int
from numpy.typing import NDArray

from mdn_jax.layers.attention import AttentionCache
from mdn_jax.models.arguments import is_whole
from mdn_jax.models.blocks import Block, decode_block
from mdn_jax.models.causal_lm import MDNForCausalLM
from mdn_jax.models.fields import require
from mdn_jax.models.generation_state import GenerationState, check_state
from mdn_jax.models.on_mesh import mesh_of
from mdn_jax.models.sampling import SamplingArrays
from mdn_jax.models.steps import KernelSteps, StepKind
from mdn_jax.models.structure import Structure


class Decoder:
    """A model ready for many calls of `prefill`, `stream` and `generate`, which take it for one.

    A model they take apart in every call, which costs milliseconds for many layers. The
    parameters of a decoder are those of the time at which it was made.

    Args:
      model: the model.
      steps: what takes single tokens: "layers", the model's own; "kernels", few, wide GPU
        kernels, for which the decoder keeps the weights once more (docs/inference.md); None: the
        kernels where they can run and are faster.

    Raises:
      ValueError: "kernels" for a model that these do not support, with what they expect.

    Attributes:
      model: the model.
      config: its configuration.
      structure: what is static of it.
      arrays: the rest.
      mesh: over which the parameters lie (`shard_model`); None: over none.
    """

    def __init__(self, model: MDNForCausalLM, *, steps: StepKind | None = None) -> None:
        self._kernels = KernelSteps(model, steps)
        self.model = model
        self.config = model.config
        graph, weights = nnx.split(model)
        self.arrays, tree = jax.tree.flatten(weights)
        self.structure = Structure(graph, tree)
        self.mesh = mesh_of(self.arrays)

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, the mesh over which the parameters lie is the ambient one."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

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
        kernels = self._kernels.for_cache(state.cache, state.position.shape[0])
        structure, arrays = kernels or (self.structure, self.arrays)
        run = decode_block(in_place=donate, graphs=kernels is not None)
        with self.on_mesh():
            return run(
                structure, arrays, state, limits, sampling, stop, size=size, logprobs=logprobs
            )


def as_decoder(model: MDNForCausalLM | Decoder) -> Decoder:
    """The decoder given, or one of the model given."""
    return model if isinstance(model, Decoder) else Decoder(model)
