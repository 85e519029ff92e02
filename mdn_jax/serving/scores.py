"""Log-probabilities from the device, as a text's events have them."""

import jax
import numpy as np
from numpy.typing import NDArray

from mdn_jax.models import Logprobs
from mdn_jax.serving.jobs import Event, Job, Scores

NOT_FINITE = "expected finite logits of the model, got nan or inf"


def block_scores(logprobs: Logprobs, slot: int, count: int, job: Job) -> Scores:
    """Those of the first tokens of a row of a block."""
    n = job.logprobs or 0
    drawn, ids, values = (np.asarray(x[slot, :count]) for x in logprobs)
    return Scores(drawn.tolist(), _pairs(ids[:, :n], values[:, :n]))


def with_prompt(job: Job, event: Event) -> Event:
    """An event with the scores of the prompt's tokens, if they are still to be told."""
    if not job.scored:
        return event
    drawn: list[float | None] = [None]  # nothing predicts the first
    likeliest: list[list[tuple[int, float]]] = [[]]
    n = job.logprobs or 0
    for count, scores in jax.device_get(job.scored):
        if not np.isfinite(scores.target[:count]).all():
            return Event(end="error", message=NOT_FINITE)
        drawn += scores.target[:count].tolist()
        likeliest += _pairs(scores.likeliest[:count, :n], scores.of_likeliest[:count, :n])
    job.scored = []
    size = len(job.prompt)  # what follows its last token is another text's
    return event._replace(prompt=Scores(drawn[:size], likeliest[:size]))


def _pairs(ids: NDArray[np.int32], values: NDArray[np.floating]) -> list[list[tuple[int, float]]]:
    """For each step the likeliest tokens with theirs."""
    steps = zip(ids.tolist(), values.tolist(), strict=True)
    return [list(zip(*step, strict=True)) for step in steps]
