"""MFU, memory and the trace of a run's steps."""

import dataclasses
import types

import jax
import pytest

from mdn_jax import MDNConfig
from tests.tiny import TINY_MODEL
from tests.train.helpers import tiny_config
from train.loop import train
from train.metrics.flops import flops_per_token
from train.metrics.utilization import PROFILE_DIRECTORY, Monitor
from train.run import Run


def test_values_of_a_known_device(corpus, tmp_path):
    config = tiny_config(corpus, tmp_path / "run")
    params = Run(config).like_params

    def device(used, peak):
        return types.SimpleNamespace(
            device_kind="NVIDIA H200",
            process_index=jax.process_index(),
            memory_stats=lambda: {"bytes_in_use": used, "peak_bytes_in_use": peak},
        )

    devices = [device(3_000_000_000, 9_000_000_000), device(4_000_000_000, 5_000_000_000)]
    monitor = Monitor(config, params, devices, start=0, traces=False)
    values = monitor.values(1e9)
    expected = 1e9 * flops_per_token(MDNConfig(**TINY_MODEL), params, 16) / (2 * 989.4e12)
    assert values == {
        "mfu": pytest.approx(expected, abs=5e-5),
        "memory_gb": 4.0,
        "peak_memory_gb": 9.0,
    }


@pytest.mark.slow
def test_a_run_leaves_a_trace_of_a_few_steps(corpus, tmp_path):
    config = dataclasses.replace(tiny_config(corpus, tmp_path / "run"), profile=True)
    assert int(train(config).state.step) == 6
    assert len(list((config.directory / PROFILE_DIRECTORY).rglob("*.xplane.pb"))) == 1
