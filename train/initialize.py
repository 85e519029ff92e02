"""The state before the first step, made where it will lie."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.models import Mixer
from mdn_jax.models.causal_lm import Block
from train.optimizer import Params
from train.parallel.sharding import with_shardings
from train.stacking import Groups, groups_of, stacked
from train.step import TrainState, init_state


def abstract_state(
    params: Params, groups: Groups, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the training state.

    Args:
      params: by layer, arrays or shapes.
      groups: layers of each stack.
      optimizer: of the stacked parameters.
      mesh: of the devices.
    """
    make = partial(_stacked_state, groups=groups, optimizer=optimizer)
    state: TrainState = with_shardings(jax.eval_shape(make, params), mesh)
    return state


def initial_params(config: MDNConfig, *, seed: int, like: Params) -> Params:
    """The parameters of `MDNForCausalLM(config, rngs=nnx.Rngs(seed))`, each device its part.

    One block at a time, so that the program for a block is compiled once, not once a layer.

    Args:
      config: of the model.
      seed: of the random numbers.
      like: shapes and shardings of the parameters by layer.

    Returns:
      The parameters by layer.
    """
    shardings = jax.tree.map(lambda x: x.sharding, like)
    if all(x.is_fully_replicated for x in jax.tree.leaves(shardings)):
        with random_numbers_by_a_kernel():
            return _initial_params(config, seed, shardings)
    return _initial_params(config, seed, shardings)


@contextlib.contextmanager
def random_numbers_by_a_kernel() -> Iterator[None]:
    """Programs lowered inside for a GPU draw their random numbers by JAX's own kernel.

    The numbers are the same. Without it each draw is hundreds of operations, which take XLA longer
    to fuse than everything else in these programs. The partitioner does not cut the kernel.
    """
    name = "jax_threefry_gpu_kernel_lowering"
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _initial_params(config: MDNConfig, seed: int, shardings: Params) -> Params:
    def outside() -> Params:  # the blocks in between are traced for their draws, not computed
        params = _params(MDNForCausalLM(config, rngs=nnx.Rngs(seed)))
        return {name: x for name, x in params.items() if name != "layers"}

    def block(layer: int, draws: Int[Array, ""]) -> tuple[Params, Int[Array, ""]]:
        rngs = nnx.Rngs(seed)
        rngs.params.count[...] = draws
        return _params(Block(config, layer, rngs=rngs)), rngs.params.count[...]

    places = {name: x for name, x in shardings.items() if name != "layers"}
    params: Params = jax.jit(outside, out_shardings=places)()
    first: dict[Mixer, Any] = {}  # a function for each kind of block
    draws = 1  # the embedding's is the first
    params["layers"] = {}
    for layer in range(config.num_hidden_layers):
        make = first.setdefault(
            config.mixer_of(layer),
            jax.jit(partial(block, layer), out_shardings=(shardings["layers"][layer], None)),
        )
        params["layers"][layer], after = make(np.uint32(draws))
        draws = int(after)
    return params


def place_state(
    params: Params, optimizer: optax.GradientTransformation, like: TrainState
) -> TrainState:
    """The state before the first step with these parameters by layer, which are not used again."""
    make = partial(_stacked_state, groups=groups_of(like), optimizer=optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, like)
    state: TrainState = jax.jit(make, out_shardings=shardings)(params)
    return state


def _stacked_state(
    params: Params, groups: Groups, optimizer: optax.GradientTransformation
) -> TrainState:
    return init_state(stacked(params, groups), optimizer)


def _params(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))
