"""The training step of a configuration as `mdn-train` builds it, without its data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from mdn_jax import MDNForCausalLM
from train.config import TrainConfig
from train.initialize import abstract_state, initial_params, place_state
from train.optimizer import make_optimizer, make_schedule
from train.sections import MeshConfig
from train.sharding import batch_sharding, from_global, make_mesh, on_mesh, replicated
from train.step import TrainState, make_train_step, split_model


class WholeStep:
    """The step, the state before the first one, a batch.

    Attributes:
      config: of the run; batches have its rows and tokens.
      mesh: all devices take rows.
      params: shapes of the parameters.
      schedule: of the learning rate.
      optimizer: of the run.
      batch: random tokens on the devices, in documents of a length of their own.
    """

    def __init__(self, config: TrainConfig, *, document: int | None = None) -> None:
        """Builds the step without compiling it.

        Args:
          config: of the run.
          document: mean length of documents packed into rows, tokens; None: a row is one document.
        """
        self.config = config
        self.mesh = make_mesh(MeshConfig(fsdp=1))
        self.schedule = make_schedule(config.optimizer, config.decay_steps)
        self.optimizer = make_optimizer(config.optimizer, self.schedule)
        dtype = jnp.dtype(config.dtype)
        model = nnx.eval_shape(
            lambda: MDNForCausalLM(
                config.model,
                implementation=config.implementation,
                remat=config.remat,
                dtype=dtype,
                rngs=nnx.Rngs(0),
            )
        )
        loss, self.params = split_model(model)
        self._like = abstract_state(self.params, self.optimizer, self.mesh)
        self._step: Any = make_train_step(
            loss,
            self.optimizer,
            self.schedule,
            accumulation=config.accumulation,
            dtype=dtype,
            state_sharding=jax.tree.map(lambda x: x.sharding, self._like),
            batch_sharding=batch_sharding(self.mesh),
            metrics_sharding=replicated(self.mesh),
        )
        self.batch = from_global(self.mesh, random_batch(config, document))

    def lower(self) -> Any:
        """The step, traced and lowered; takes and returns the state, and metrics."""
        return on_mesh(self.mesh, self._step.lower)(self._like, self.batch)

    def initial_state(self) -> TrainState:
        """The state before the first step."""
        params = initial_params(self.config.model, seed=0, like=self._like.params)
        return jax.block_until_ready(place_state(params, self.optimizer, self._like))


def random_batch(config: TrainConfig, document: int | None) -> dict[str, NDArray[np.int32]]:
    """Tokens, documents and targets of one step, the same at every call."""
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.sequence_length)
    tokens = rng.integers(config.model.vocab_size, size=shape, dtype=np.int32)
    starts = rng.random(shape) < (0 if document is None else 1 / document)
    return {
        "tokens": tokens,
        "segment_ids": np.cumsum(starts, axis=1, dtype=np.int32),
        "targets": np.roll(tokens, -1, axis=1),
    }
