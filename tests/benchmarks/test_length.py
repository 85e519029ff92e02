"""`python -m benchmarks length` on a CPU."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks.length import Case, LengthConfig, _check, length

TINY = {"heads": 1, "key_dim": 4, "value_dim": 4, "attention_heads": 1, "attention_dim": 4}


def test_the_same_tokens_in_rows_of_two_lengths(tmp_path, capsys):
    output = tmp_path / "length.json"
    config = LengthConfig(
        lengths=(8, 16),
        tokens=16,
        attention_to=8,
        dtype="float32",
        implementation="scan",
        runs=2,
        threads=1,
        output=output,
        **TINY,
    )
    length(config)
    assert "(1.00)" in capsys.readouterr().out
    results = json.loads(output.read_text())["results"]
    timed = {(x["name"], x["length"]) for x in results}
    assert timed == {("rule", 8), ("rule", 16), ("attention", 8)}
    assert all(x["median"] > 0 for x in results)
    figure = tmp_path / "figure.png"
    length(LengthConfig(report=(output, output), figure=figure))
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert str(figure) in capsys.readouterr().out


def test_what_does_not_fit_into_the_memory_is_left_out(monkeypatch, capsys):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr("benchmarks.length.measure_compiled", full)
    sizes = {"lengths": (8,), "tokens": 8, "attention_to": 0, "dtype": "float32"}
    length(LengthConfig(implementation="scan", runs=2, threads=1, **sizes, **TINY))
    assert "rule, both, rows of 8: out of memory" in capsys.readouterr().out


def test_rows_that_do_not_begin_alike_are_not_timed():
    config = LengthConfig(lengths=(2, 4), tokens=4)
    first = {"rule": jnp.ones((2, 1, 1))}
    with pytest.raises(SystemExit, match=r"rule: the beginning of a row of 4 is .* not timed"):
        _check(config, Case("rule", "forward", 4), jnp.zeros((1, 4, 1, 1)), first)


def test_lengths_that_do_not_fit():
    with pytest.raises(ValueError, match="lengths: expected divisors of tokens = 4, got 3"):
        LengthConfig(lengths=(3,), tokens=4)
    with pytest.raises(ValueError, match=r"rows: expected an int >= 1 or None, got 0"):
        LengthConfig(rows=0)
    config = LengthConfig(lengths=(3, 5), rows=2)  # of any length
    assert (config.most, config.rows_of(3), config.rows_of(5)) == (10, 2, 2)
