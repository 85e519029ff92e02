"""`python -m benchmarks drift` at a tiny size."""

import json

import numpy as np
import pytest

from benchmarks import drift as command
from benchmarks.drift import DriftConfig

TINY = {"length": 100, "heads": 2, "key_dim": 8, "value_dim": 4, "windows": 10, "replay": 4}


def test_rows_and_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_PIECE", 60)  # two of them, the second cut
    output = tmp_path / "drift.json"
    command.drift(DriftConfig(**TINY, gates=("slow",), output=output))
    table = capsys.readouterr().out
    assert "| to 100" in table
    curves = json.loads(output.read_text())["curves"]
    worst = {(x["state_dtype"], x["replay"]): max(x["worst"]) for x in curves}
    assert set(worst) == {(d, n) for d in command.STATE_DTYPES for n in (1, 4)}
    assert max(worst["float32", 1], worst["float32", 4]) <= 1e-5
    for replay in (1, 4):
        assert 1e-5 <= worst["float16_scaled", replay] < worst["bfloat16", replay] <= 0.1


def test_gates_are_those_of_layers_and_faint_ones_write_less():
    slow, faint = (command.gates_of(name, 2, 50, seed=1) for name in ("slow", "faint"))
    assert slow["beta"].shape == (1, 50, 2)
    np.testing.assert_allclose(faint["beta"], slow["beta"] / 100, rtol=1e-6)
    np.testing.assert_array_equal(faint["log_alpha"], slow["log_alpha"])
    assert float(slow["log_alpha"].min()) > -0.05


def test_windows_that_do_not_fit():
    with pytest.raises(SystemExit, match="length: expected a multiple of windows = 10"):
        command.drift(DriftConfig(**TINY | {"length": 105}))
