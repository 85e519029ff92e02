"""`python -m benchmarks context`, with what devices there are."""

import json

import pytest

from benchmarks.context import ContextConfig, context

TINY = {"shape": (1, 6, 1, 4, 4), "dtype": "float32", "implementation": "scan", "runs": 2}


def test_an_axis_of_one_device(tmp_path, capsys):
    output = tmp_path / "context.json"
    context(ContextConfig(**TINY, devices=(1,), output=output))
    assert "each device sends 0.000366 MiB a pass" in capsys.readouterr().out  # 8 x 12 numbers
    assert set(json.loads(output.read_text())["results"]) == {"1 forward", "1 both"}


def test_devices_that_do_not_fit():
    with pytest.raises(SystemExit, match="devices: expected divisors of T = 6 up to 1, got 4"):
        context(ContextConfig(**TINY, devices=(4,)))
