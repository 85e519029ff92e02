"""`python -m benchmarks parity` compares each implementation with the first."""

import types

import numpy as np
import pytest

from benchmarks import parity as command
from benchmarks.parity import ParityConfig, parity

CURVES = {
    "scan": [4.0, 3.0, 2.0],
    "xla": [4.0, 3.006, 2.0],
    "pallas_triton": [4.0, 3.003, 2.1],
}


@pytest.fixture
def curves(monkeypatch):
    monkeypatch.setattr(command, "_losses", lambda config, name: np.array(CURVES[name]))


def test_pairs_are_printed_and_held_to_the_tolerance(curves, capsys):
    config = ParityConfig(implementations=("scan", "xla", "pallas_triton"), learning_rate=2e-3)
    with pytest.raises(SystemExit, match=r"^pallas_triton above the tolerance of 0.01"):
        parity(config)
    out = capsys.readouterr().out
    assert "learning rate 0.002" in out
    assert "from scan 2.00e-03, at step 2" in out
    assert "from scan 5.00e-02, at step 3" in out


def test_within_the_tolerance(curves, capsys):
    parity(ParityConfig(implementations=("scan", "xla")))  # does not raise
    assert "from scan 2.00e-03, at step 2" in capsys.readouterr().out


def test_nan_is_above_every_tolerance(monkeypatch):
    losses = {"xla": np.array([1.0, 1.0]), "scan": np.array([1.0, np.nan])}
    monkeypatch.setattr(command, "_losses", lambda config, name: losses[name])
    with pytest.raises(SystemExit, match="scan above"):
        parity(ParityConfig(implementations=("xla", "scan"), tolerance=1e9))


def test_one_is_no_pair():
    with pytest.raises(SystemExit, match="two or more"):
        parity(ParityConfig(implementations=("xla",)))


def test_the_run_has_the_learning_rate(tmp_path):
    run = command._run(ParityConfig(learning_rate=2e-3, dtype="float32"), "scan", str(tmp_path))
    assert run.optimizer.learning_rate == 2e-3
    assert (run.implementation, run.dtype) == ("scan", "float32")


def test_a_run_that_a_signal_ended_is_not_compared(monkeypatch):
    ended = types.SimpleNamespace(signal=2)
    monkeypatch.setattr("train.loop.train", lambda config: ended)
    with pytest.raises(SystemExit, match="stopped by a signal in the run on xla"):
        parity(ParityConfig(implementations=("xla", "scan")))
