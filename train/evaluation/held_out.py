"""The loss of a run on its held-out documents."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from mdn_jax.models.loss import IGNORED
from train.data.packing import Batch
from train.optimizer import Params
from train.step import Loss


class HeldOutLoss(NamedTuple):
    """A held-out loss, nats per target (per byte, with byte-level tokens).

    Attributes:
      mean: over all targets.
      sources: over those of each source of a mixture.
    """

    mean: float
    sources: dict[str, float]


def make_evaluate(
    summed_loss: Loss,
    batches: Sequence[Batch],
    *,
    sources: Mapping[str, slice] | None = None,
    place: Callable[[Batch], Batch] = lambda batch: batch,
) -> Callable[[Params], HeldOutLoss]:
    """Builds the measurement of the mean loss over fixed batches.

    Args:
      summed_loss: of the model, over a batch's targets.
      batches: what to measure on, all of one shape.
      sources: which of the batches are of which source.
      place: puts a batch onto the devices.

    Returns:
      Function from parameters to the loss.
    """
    counts = np.array([np.sum(batch["targets"] != IGNORED) for batch in batches])
    loss = jax.jit(summed_loss)

    def evaluate(params: Params) -> HeldOutLoss:
        sums = [float(loss(params, place(batch))) for batch in batches]
        each = {
            name: sum(sums[where]) / int(counts[where].sum())
            for name, where in (sources or {}).items()
        }
        return HeldOutLoss(sum(sums) / int(counts.sum()), each)

    return evaluate
