"""Groups of calls are as long as asked for, and what is reported is one call's."""

import time

import jax.numpy as jnp
import pytest

from benchmarks import timing
from benchmarks.timing import Compiled, calls_for, compile_for, measure, measure_compiled


def sleeper(log):
    def call(x):
        log.append(x)
        time.sleep(2e-3)
        return x

    return Compiled(call, seconds=1.5, memory=7)


def test_a_group_is_many_short_calls():
    log = []
    result = measure_compiled(sleeper(log), 3, runs=4, group_seconds=0.01)
    assert 3 <= result.calls <= 5
    assert 2e-3 <= result.median < 8e-3
    assert (result.compile, result.memory, result.peak) == (1.5, 7, None)
    assert len(log) >= 4 * result.calls


def test_a_group_on_a_cpu_is_one_call(monkeypatch):
    monkeypatch.setattr(timing.jax, "default_backend", lambda: "cpu")
    log = []
    result = measure_compiled(sleeper(log), 3, runs=4)
    assert result.calls == 1
    assert len(log) == 3 + 4
    assert "waiting for each" in timing.how_timed(4)


def test_a_gpu_is_not_waited_for_between_calls(monkeypatch):
    monkeypatch.setattr(timing.jax, "default_backend", lambda: "gpu")
    waits = []
    monkeypatch.setattr(timing.jax, "block_until_ready", lambda x: waits.append(x) or x)
    log = []
    result = measure_compiled(sleeper(log), 3, runs=4)
    assert result.calls >= 3
    assert len(waits) < len(log) / 2
    assert "without a wait between them" in timing.how_timed(4)


@pytest.mark.parametrize(
    ("group", "call", "calls"), [(0.01, 1e-3, 10), (0.01, 1.0, 1), (0.01, 0.0, 10_000)]
)
def test_calls_for(group, call, calls):
    assert calls_for(group, call) == calls


def test_measure_plans_memory_and_keeps_its_arguments():
    x = jnp.ones((256, 256))
    compiled = compile_for(lambda x: x @ x, x)
    assert compiled.memory >= x.nbytes
    result = measure(lambda x: x @ x, x, runs=3)
    assert result.median > 0
    assert result.compile > 0
    assert not x.is_deleted()


def test_too_few_runs():
    with pytest.raises(ValueError, match="runs: expected at least 2, got 1"):
        measure(lambda x: x, jnp.ones(()), runs=1)


def test_the_peak_is_unknown_once_more_was_needed(monkeypatch):
    counts = iter(
        [
            {"bytes_in_use": 5, "peak_bytes_in_use": 5},
            {"bytes_in_use": 6, "peak_bytes_in_use": 30},
            {"bytes_in_use": 6, "peak_bytes_in_use": 30},
            {"bytes_in_use": 6, "peak_bytes_in_use": 30},
        ]
    )
    monkeypatch.setattr(timing, "_memory_stats", lambda: next(counts))
    compiled = Compiled(lambda: 1, seconds=0.0, memory=0)
    assert timing.call_and_peak(compiled) == (1, 25)
    assert timing.call_and_peak(compiled) == (1, None)
