"""`python -m benchmarks residuals`: what it lists."""

import pytest

from benchmarks.residuals import ResidualsConfig, residuals


def test_the_largest_and_the_sum(capsys):
    residuals(ResidualsConfig(remat="kernel"))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    sizes = [int(line.split("|")[3].replace(",", "")) for line in table[1:]]
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
    assert sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=len(sizes))
    assert sizes[-1] < 20_000  # "none" keeps three times that


def test_another_model():
    with pytest.raises(ValueError, match=r"model: expected one of smoke, .*, got 'large'"):
        ResidualsConfig(model="large")
