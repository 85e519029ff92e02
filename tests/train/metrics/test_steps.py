"""Metrics of steps, read one behind, and their speed."""

import types

import jax.numpy as jnp
import pytest

from train.config import TrainConfig
from train.config_sections import GuardConfig
from train.guard import DivergedError
from train.metrics.steps import Pace, StepReports
from train.step import StepMetrics


def test_pace_counts_what_lies_between_the_ends_of_steps():
    times = iter([0.0, 2.0, 5.0, 100.0, 104.0])
    pace = Pace(10, clock=lambda: next(times))
    assert (pace.ended(), pace.ended()) == (2.0, 3.0)
    pace.start()  # an evaluation, until 100
    pace.ended()
    assert (pace.seconds, pace.steps) == (9.0, 3)
    assert pace.take() == pytest.approx(30 / 9)
    assert (pace.seconds, pace.steps) == (0.0, 0)


class Lines(list):
    def write(self, **values):
        self.append(values)


def reports(lines, **guard):
    config = TrainConfig(batch_size=2, sequence_length=8, guard=GuardConfig(**guard))
    ignored = types.SimpleNamespace(advance=lambda: None, report=lambda *_: None)
    return StepReports(
        config,
        batches=types.SimpleNamespace(waited=0.0),
        epochs={"epoch": 0.5},
        monitor=types.SimpleNamespace(values=lambda speed: {}, ends=lambda step: False),
        log=lines,
        progress=ignored,
    )


def metrics(loss, *, refused=0):
    zero = jnp.zeros(())
    return StepMetrics(jnp.float32(loss), zero, zero, zero, jnp.int32(refused), zero, {"mlp": zero})


def test_a_step_is_read_when_the_next_is_there():
    lines = Lines()
    steps = reports(lines)
    steps.add(1, metrics(5.0), logged=True)
    assert not lines
    steps.add(2, metrics(4.0), logged=False)
    assert [(x["step"], x["loss"], x["epoch"]) for x in lines] == [(1, 5.0, 0.5)]
    assert "spike" not in lines[0]
    steps.add(3, metrics(3.0), logged=True)
    steps.finish()
    steps.finish()
    assert [x["step"] for x in lines] == [1, 3]


def test_a_refused_step_ends_the_run_one_step_later_and_is_written():
    lines = Lines()
    steps = reports(lines, patience=1)
    steps.add(7, metrics(float("nan"), refused=1), logged=True)
    with pytest.raises(DivergedError, match="step 7") as error:
        steps.add(8, metrics(1.0), logged=True)
    assert error.value.step == 7
    assert [x["step"] for x in lines] == [7]
