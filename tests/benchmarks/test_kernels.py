"""`python -m benchmarks kernels` checks before it times, and says what it did not time."""

import importlib.metadata
import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import kernels as command
from benchmarks import neighbours
from benchmarks.kernels import KernelsConfig
from benchmarks.neighbours import Neighbour, gated_delta_rule
from benchmarks.report import PARTS
from mdn_jax import momentum_delta_rule
from mdn_jax.ops import api

TINY = (1, 70, 1, 16, 16)


def test_table_and_json(tmp_path, capsys):
    output = tmp_path / "kernels.json"
    config = KernelsConfig(
        shapes=("1,70,1,16,16", "1,20,2,16,16"),
        implementations=("scan",),
        parts=("forward", "kept", "both"),
        runs=2,
        neighbour=False,
        output=output,
    )
    command.kernels(config)
    out = capsys.readouterr().out
    for text in ("B,T,H,K,V = 1,70,1,16,16", "B,T,H,K,V = 1,20,2,16,16", "states kept"):
        assert text in out
    for column in ("TFLOP/s", "GB/s", "x floor", "MiB planned", "MiB peak", "compile s"):
        assert column in out
    assert "median of 2 runs" in out
    record = json.loads(output.read_text())
    rows = record["results"]
    assert [row["pass"] for row in rows[:3]] == list(PARTS.values())
    assert [row["shape"][1] for row in rows] == [70] * 3 + [20] * 3
    assert all(row["median"] > 0 and row["memory"] > 0 for row in rows)
    assert rows[0]["flops"] * 3 == rows[2]["flops"]
    assert record["not_timed"] == []


def test_a_wrong_implementation_is_not_timed(monkeypatch, capsys):
    def rule(*, implementation, **arrays):
        o, state = momentum_delta_rule(**arrays, implementation="scan")
        return (o * 1.001 if implementation == "xla" else o), state

    monkeypatch.setattr(command, "momentum_delta_rule", rule)
    config = KernelsConfig(shape=TINY, implementations=("xla", "scan"), parts=("both",), runs=2)
    with pytest.raises(SystemExit, match=r"^xla at 1,70,1,16,16 is not timed: relative errors 1.0"):
        command.kernels(config)
    out = capsys.readouterr().out
    assert "| scan " in out
    assert "| xla " not in out


def test_pieces_are_of_the_kernels(monkeypatch):
    monkeypatch.setattr(api, "_capability", lambda: None)
    config = KernelsConfig(
        shape=TINY, implementations=("pallas_triton",), pieces=(2,), parts=("both",), runs=2
    )
    words = r"^pallas_triton, pieces 2 at 1,70,1,16,16 is not timed: .*expected a CUDA GPU, got"
    with pytest.raises(SystemExit, match=words):
        command.kernels(config)


@pytest.mark.parametrize("wrong", [False, True])
def test_long_inputs_are_checked_over_their_first_steps(wrong, monkeypatch, capsys):
    def rule(*, implementation, **arrays):
        o, state = momentum_delta_rule(**arrays, implementation="scan")
        if wrong and implementation == "xla" and o.shape[1] > 1041:
            o = o.at[:, 1040].set(0)
        return o, state

    monkeypatch.setattr(command, "momentum_delta_rule", rule)
    config = KernelsConfig(
        shape=(1, 1100, 1, 16, 16),
        implementations=("xla",),
        parts=("both",),
        runs=2,
        check_steps=64,
        neighbour=False,
    )
    if wrong:
        with pytest.raises(SystemExit, match="not timed"):
            command.kernels(config)
    else:
        command.kernels(config)
    assert "checked over the first 1041 steps" in capsys.readouterr().out


def test_what_cannot_run_is_said(capsys):
    config = KernelsConfig(shape=TINY, implementations=("pallas_triton",), runs=2, neighbour=False)
    if command.jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="not timed: ValueError: implementation"):
        command.kernels(config)


def test_shapes():
    assert command._shapes(KernelsConfig(preset="h100"))[0] == (8, 4096, 6, 128, 256)
    assert command._shapes(KernelsConfig(shape=TINY)) == [TINY]
    with pytest.raises(SystemExit, match=r"expected B,T,H,K,V .* 1,2,3"):
        command._shapes(KernelsConfig(shapes=("1,2,3",)))


@pytest.fixture
def jla(monkeypatch):
    """A stand-in with the interface of jax-linear-attention 0.1.0; returns what it was asked."""
    asked = []

    def linear_attention(kind, q, k, v, *, g, beta, **options):
        asked.append((kind, options))
        arrays = {"q": q, "k": k, "v": v, "log_alpha": g, "beta": beta}
        o, state = neighbours.reference_rule(**arrays)
        return o, state.s

    ops = SimpleNamespace(KINDS={"gated_deltanet": ()}, linear_attention=linear_attention)
    monkeypatch.setitem(sys.modules, "jla", SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "jla.ops", ops)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0")
    return asked


def test_a_neighbour_is_timed_in_the_same_run(jla, capsys):
    command.kernels(KernelsConfig(shape=TINY, implementations=("scan",), parts=("both",), runs=2))
    assert (
        "gated delta rule, half the flops (jax-linear-attention 0.1.0)" in capsys.readouterr().out
    )
    kind, options = jla[0]
    assert kind == "gated_deltanet"
    assert options["use_qk_l2norm"]


def test_a_wrong_neighbour_is_not_timed_and_no_failure(jla, monkeypatch, capsys):
    found = gated_delta_rule()
    assert isinstance(found, Neighbour)

    def wrong(**arrays):
        o, state = found.rule(**arrays)
        return 2 * o, state

    monkeypatch.setattr(neighbours, "gated_delta_rule", lambda: found._replace(rule=wrong))
    command.kernels(KernelsConfig(shape=TINY, implementations=("scan",), parts=("both",), runs=2))
    assert "is not timed: relative errors" in capsys.readouterr().out


def test_a_neighbour_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "jla.ops", None)
    assert "cannot be imported" in gated_delta_rule()


def test_a_neighbour_of_another_interface(jla, monkeypatch):
    monkeypatch.setitem(sys.modules, "jla.ops", SimpleNamespace(KINDS={}))
    assert "no jla.ops.linear_attention" in gated_delta_rule()
