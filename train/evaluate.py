"""The held-out loss."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from train.data.packing import IGNORED, Batch
from train.optimizer import Params
from train.step import Forward, summed_loss


def make_evaluate(forward: Forward, batches: Sequence[Batch]) -> Callable[[Params], float]:
    """Builds the measurement of the mean loss over fixed batches.

    Args:
      forward: logits of the model.
      batches: what to measure on, all of one shape.

    Returns:
      Function from parameters to nats per target (per byte, with byte-level tokens).
    """
    count = sum(int(np.sum(batch["targets"] != IGNORED)) for batch in batches)

    @jax.jit
    def loss(params: Params, batch: Batch) -> jax.Array:
        logits = forward(params, batch["tokens"], batch["segment_ids"])
        return summed_loss(logits, batch["targets"])

    def evaluate(params: Params) -> float:
        return sum(float(loss(params, batch)) for batch in batches) / count

    return evaluate
