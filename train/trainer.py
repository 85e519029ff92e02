"""What a run computes with: its documents, its model and its compiled functions."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mdn_jax import MDNForCausalLM
from train.config import TrainConfig
from train.data.batches import load_data
from train.data.packing import Batch, unigram_entropy
from train.evaluate import make_evaluate
from train.initialize import abstract_state, initial_params, place_state
from train.optimizer import Params, make_optimizer, make_schedule
from train.sharding import (
    batch_sharding,
    check_divisible,
    from_global,
    from_local,
    make_mesh,
    on_mesh,
    process_share,
    replicated,
)
from train.stability import make_stability
from train.step import TrainState, make_train_step, split_model


class Trainer:
    """The documents, the model and the compiled functions of one resolved configuration."""

    def __init__(self, config: TrainConfig, *, devices: Sequence[jax.Device] | None = None) -> None:
        """Reads the documents and builds the model's functions.

        Args:
          config: resolved configuration.
          devices: to run on; None: all of all processes.

        Raises:
          RunError: a corpus that cannot be used, or a mesh that does not fit.
        """
        self.config = config
        self.data = load_data(config)
        self.unigram = unigram_entropy(self.data.held_out)
        self.schedule = make_schedule(config.optimizer, config.decay_steps)
        self.optimizer = make_optimizer(config.optimizer, self.schedule)
        self.mesh = make_mesh(config.mesh, devices)
        self.share = process_share(self.mesh)
        self.model = nnx.eval_shape(
            lambda: MDNForCausalLM(
                config.model,
                implementation=config.implementation,
                remat=config.remat,
                dtype=jnp.dtype(config.dtype),
                rngs=nnx.Rngs(0),
            )
        )
        self.loss, params = split_model(self.model)
        check_divisible(config, self.mesh, params)
        self.like = abstract_state(params, self.optimizer, self.mesh)
        step = make_train_step(
            self.loss,
            self.optimizer,
            self.schedule,
            guard=config.guard,
            accumulation=config.accumulation,
            dtype=jnp.dtype(config.dtype),
            state_sharding=jax.tree.map(lambda x: x.sharding, self.like),
            batch_sharding=batch_sharding(self.mesh),
            metrics_sharding=replicated(self.mesh),
        )
        evaluate = make_evaluate(
            self.loss, self.data.held_out, place=partial(from_global, self.mesh)
        )
        self.train_step = on_mesh(self.mesh, step)
        self.evaluate = on_mesh(self.mesh, evaluate)
        self.stability = on_mesh(self.mesh, make_stability(self.model))

    def initial_state(self) -> TrainState:
        """The state before the first step."""
        config = self.config
        return self.begin(initial_params(config.model, seed=config.seed, like=self.like.params))

    def begin(self, params: Params) -> TrainState:
        """The state before the first step with these parameters, whose buffers it takes over."""
        return place_state(params, self.optimizer, self.like)

    def place(self, batch: Batch) -> Batch:
        """A batch on the devices, from each process's rows."""
        return from_local(self.mesh, batch)

    def describe(self) -> str:
        """One line on the size of the run."""
        parameters = sum(x.size for x in jax.tree.leaves(self.like.params))
        devices = self.mesh.devices
        return (
            f"{parameters:,} parameters, {self.data.size}, "
            f"{self.config.tokens_per_step:,} tokens a step, on {devices.size} x "
            f"{devices.flat[0].device_kind} in {jax.process_count()} process(es)"
        )
