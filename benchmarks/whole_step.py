"""The training step of a configuration as `python -m train` builds it, on random tokens."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from train.config import TrainConfig
from train.model_and_step import ModelAndStep
from train.parallel.sharding import from_global, on_mesh
from train.step import TrainState


class WholeStep(ModelAndStep):
    """The step and a batch for it, of a configuration's rows and tokens.

    Attributes:
      batch: random tokens on the devices.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        document: int | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        """Builds the step without compiling it.

        Args:
          config: of the run.
          document: mean length of documents packed into rows, tokens; None: a row is one document.
          devices: to run on; None: all.
        """
        super().__init__(config, devices=devices)
        self.batch = from_global(self.mesh, random_batch(config, document))

    def lower(self) -> Any:
        """The step, traced and lowered; takes and returns the state, and metrics."""
        step: Any = self.step
        return on_mesh(self.mesh, step.lower)(self.like, self.batch)

    def initial_state(self) -> TrainState:
        """The state before the first step, once it is there."""
        return jax.block_until_ready(super().initial_state())


def random_batch(config: TrainConfig, document: int | None) -> dict[str, NDArray[np.int32]]:
    """Tokens, targets and documents, if there are, of one step; the same at every call."""
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.sequence_length)
    tokens = rng.integers(config.model.vocab_size, size=shape, dtype=np.int32)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1)}
    if document is not None:
        starts = rng.random(shape) < 1 / document
        batch["segment_ids"] = np.cumsum(starts, axis=1, dtype=np.int32)
    return batch
