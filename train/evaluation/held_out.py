"""The loss of a run on its held-out documents."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from mdn_jax.models.loss import IGNORED
from train.data.packing import Batch
from train.optimizer import Params
from train.step import Loss


def make_evaluate(
    summed_loss: Loss,
    batches: Sequence[Batch],
    *,
    place: Callable[[Batch], Batch] = lambda batch: batch,
) -> Callable[[Params], float]:
    """Builds the measurement of the mean loss over fixed batches.

    Args:
      summed_loss: of the model, over a batch's targets.
      batches: what to measure on, all of one shape.
      place: puts a batch onto the devices.

    Returns:
      Function from parameters to nats per target (per byte, with byte-level tokens).
    """
    count = sum(int(np.sum(batch["targets"] != IGNORED)) for batch in batches)
    loss = jax.jit(summed_loss)

    def evaluate(params: Params) -> float:
        return sum(float(loss(params, place(batch))) for batch in batches) / count

    return evaluate
