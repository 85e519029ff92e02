"""`python -m benchmarks check` covers what ships and catches kernels that are wrong."""

import dataclasses
import json
import time
from collections import Counter
from itertools import product

import numpy as np
import pytest

import pallas_kernels.momentum_delta.vjp
from benchmarks import check as command
from benchmarks.cases import VALUE_DIMS, Case, shipped_cases
from benchmarks.check import CheckConfig, interpreted_rule, run_cases
from mdn_jax import momentum_delta_rule
from mdn_jax.testing import GATE_REGIMES
from pallas_kernels.tiling import (
    KEY_DIMS,
    SHARED_MEMORY,
    choose_tiles,
    decode_tiles,
    padded_key_dim,
    padded_value_dim,
    unsupported,
)

TINY = Case(16, 16, "float32", length=20)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_tile_choice_is_covered(capability):
    def key(key_dim, value_dim, itemsize, explicit_p, heads):
        key_dim, value_dim = padded_key_dim(key_dim), padded_value_dim(value_dim)
        tiles = choose_tiles(key_dim, value_dim, itemsize, capability, explicit_p, heads=heads)
        return key_dim, itemsize, explicit_p, tiles

    cases = shipped_cases(capability)
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
    covered = {
        key(x.key_dim, x.value_dim, sizes[x.dtype], x.explicit_p, x.value_heads)
        for x in cases
        if x.backward and not x.precise
    }
    shipped = {
        key(key_dim, value_dim, itemsize, p, heads)
        for key_dim, value_dim, itemsize, p, heads in product(
            KEY_DIMS, VALUE_DIMS, (2, 4), (False, True), (1, 8, 48, 1000)
        )
        if not unsupported(key_dim, value_dim, capability, itemsize=itemsize, explicit_p=p)
    }
    assert shipped <= covered

    def precise(key_dim, value_dim, explicit_p):
        key_dim, value_dim = padded_key_dim(key_dim), padded_value_dim(value_dim)
        return choose_tiles(key_dim, value_dim, 2, (9, 0), explicit_p, precise=True, heads=1)

    covered = {precise(x.key_dim, x.value_dim, x.explicit_p) for x in cases if x.precise}
    shipped = {precise(*sizes) for sizes in product(KEY_DIMS, VALUE_DIMS, (False, True))}
    assert (shipped <= covered) == (capability >= (9, 0))


def test_every_feature_is_covered_several_times():
    cases = shipped_cases((9, 0))
    assert len({x.name for x in cases}) == len(cases) < 140
    for name, values in {
        "regime": GATE_REGIMES,
        "dtype": ("bfloat16", "float16", "float32"),
        "explicit_p": (False, True),
        "groups": (1, 2),
        "heads": (1, 2),
        "keys": ("random", "parallel", "zero"),
        "initial_state": (False, True),
        "length": (130, 200),
        "implementation": ("pallas_triton", "triton"),
    }.items():
        counts = Counter(getattr(x, name) for x in cases)
        assert all(counts[value] >= 5 for value in values), (name, counts)
    assert sum(x.documents > 1 for x in cases) >= 10
    assert {x.pieces for x in cases} >= {2, 3, 4, 6, 8, 12, 16}
    # errors of few heads are not hidden by those of others
    assert sum(x.rows == 1 for x in cases if x.backward) >= 80
    assert {24, 96} <= {x.key_dim for x in cases}
    wide = {(x.key_dim, x.value_dim) for x in cases if x.dtype == "float32"}
    assert {(256, 512), (32, 256), (64, 256), (96, 256)} <= wide
    assert shipped_cases((9, 0)) == cases


def test_every_tile_choice_of_the_decode_kernel_is_covered_in_both_languages():
    shipped = {
        (size, decode_tiles(size, padded_value_dim(value_dim), heads))
        for size, value_dim, heads in product(KEY_DIMS, VALUE_DIMS, (1, 512))
    }
    for implementation in ("pallas_triton", "triton"):
        cases = [
            x
            for x in shipped_cases((9, 0))
            if x.implementation == implementation and not x.backward
        ]
        assert all(x.length <= 16 for x in cases)
        assert shipped <= {
            (size, decode_tiles(size, padded_value_dim(x.value_dim), x.heads * x.groups))
            for x in cases
            for size in [padded_key_dim(x.key_dim)]
        }
        assert {x.length for x in cases} >= {1, 2, 16}
        assert {x.dtype for x in cases} == {"float32", "bfloat16", "float16"}
        assert {x.keys for x in cases} == {"random", "parallel", "zero"}
        for name in ("explicit_p", "initial_state"):
            assert {getattr(x, name) for x in cases} == {False, True}
        assert any(x.documents > 1 for x in cases)


@pytest.mark.slow
def test_right_kernels_pass_and_corrupted_ones_do_not(monkeypatch, tmp_path, capsys):
    packed = Case(16, 16, "float32", length=20, documents=2, initial_state=False)
    decoded = dataclasses.replace(TINY, length=3, backward=False)
    native = dataclasses.replace(decoded, implementation="triton")
    monkeypatch.setattr(command, "shipped_cases", lambda capability: [packed, decoded, native])
    command.check(CheckConfig(interpret=True, threads=1))
    out = capsys.readouterr().out
    assert f"ok   {packed.name}: " in out
    (line,) = [line for line in out.splitlines() if line.startswith(f"ok   {decoded.name}: ")]
    assert "gradients" not in line
    assert "the scan's moves" not in line
    assert "without those in native Triton: it has no interpreter here" in out
    assert "2 of 2 cases right" in out

    state_bwd = pallas_kernels.momentum_delta.vjp.state_bwd_in_pieces

    def corrupted(*arguments):
        result = state_bwd(*arguments)
        wrong = result.d_v.data.at[:, 7].multiply(1.01)
        return result._replace(d_v=result.d_v._replace(data=wrong))

    monkeypatch.setattr(pallas_kernels.momentum_delta.vjp, "state_bwd_in_pieces", corrupted)
    monkeypatch.setattr(command, "shipped_cases", lambda capability: [TINY])
    output = tmp_path / "check.json"
    with pytest.raises(SystemExit, match="1 cases wrong, 0 not run"):
        command.check(CheckConfig(interpret=True, threads=1, draws=2, output=output))
    out = capsys.readouterr().out
    assert f"FAIL {TINY.name}: " in out
    for result in json.loads(output.read_text())["results"]:
        assert not result["passed"]
        assert result["worst"]["output"] <= 1e-5
        assert result["worst"]["gradient"] > 5e-4
    assert "0 of 1 cases right" in out
    assert "float32: 2 of 2 draws have a gradient outside" in out
    assert f"wrong: {TINY.name}_draw1" in out


@pytest.mark.slow
def test_what_half_a_unit_of_the_inputs_does_stands_beside_16_bit_gradients(
    monkeypatch, tmp_path, capsys
):
    half = dataclasses.replace(TINY, dtype="bfloat16")
    monkeypatch.setattr(command, "shipped_cases", lambda capability: [half])
    output = tmp_path / "check.json"
    command.check(CheckConfig(interpret=True, threads=1, rows=16, draws=2, output=output))
    results = json.loads(output.read_text())["results"]
    out = capsys.readouterr().out
    assert [x["name"] for x in results] == [f"{half.name}_B16{draw}" for draw in ("", "_draw1")]
    assert [x["draw"] for x in results] == [0, 1]
    for result in results:
        assert result["case"]["rows"] == 16
        assert 1e-4 < result["moved"] < 1e-2
        assert f"(the scan's moves by {result['moved']:.1e})" in out
    largest, other = sorted((x["worst"]["gradient"] for x in results), reverse=True)
    assert largest > other
    assert "1 of 1 cases right" in out
    assert f"bfloat16: 0 of 2 draws have a gradient outside; {largest:.1e} {other:.1e}\n" in out


def test_other_bits_are_wrong():
    same = ((np.zeros(2), np.array([np.nan])), {"q": np.ones(1)})
    other = ((np.array([0.0, -0.0]), np.array([np.nan])), {"q": np.ones(1)})
    assert command._same_bits(same, same)
    assert not command._same_bits(same, other)


def test_a_case_that_breaks_leaves_the_others():
    def broken(**arrays):
        raise RuntimeError("RESOURCE_EXHAUSTED: shared memory\nmore")

    outcomes = list(run_cases([TINY, TINY], broken, threads=2))
    assert [x.failure for x in outcomes] == ["RuntimeError: RESOURCE_EXHAUSTED: shared memory"] * 2
    assert not any(x.passed for x in outcomes)
    assert "FAIL" in str(outcomes[0])


def test_cases_left_out_for_time_are_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(command, "shipped_cases", lambda capability: [TINY])
    with pytest.raises(SystemExit, match="0 cases wrong, 1 not run"):
        command.check(CheckConfig(interpret=True, limit_seconds=-1.0))
    assert f"not run: {TINY.name}" in capsys.readouterr().out
    late = time.perf_counter() - 1
    assert not list(run_cases([TINY], interpreted_rule, threads=1, deadline=late))


def test_only_and_show(capsys):
    command.check(CheckConfig(interpret=True, only="^K256_V512_.*_p_", show=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.startswith("K256_V512_") and "_p_" in line for line in lines)
    with pytest.raises(SystemExit, match="no case has 'nothing'"):
        command.check(CheckConfig(interpret=True, only="nothing"))
    with pytest.raises(SystemExit, match="draws: expected at least 1, got 0"):
        command.check(CheckConfig(interpret=True, draws=0))


def test_a_cpu_is_told_of_the_interpreter(monkeypatch):
    monkeypatch.setattr(command.api, "_capability", lambda: None)
    with pytest.raises(SystemExit, match="a CUDA GPU; --interpret"):
        command.check(CheckConfig())


def test_the_suite_is_selected_by_name(capsys):
    config = CheckConfig(interpret=True, properties=True, only="bfloat16-(no_leak|causal)$")
    command.check(dataclasses.replace(config, show=True))
    names = [f"{x}-bfloat16-{y}" for x in ("chunks", "decode") for y in ("no_leak", "causal")]
    assert capsys.readouterr().out.splitlines() == names
    with pytest.raises(SystemExit, match="no check has 'nothing'"):
        command.check(dataclasses.replace(config, only="nothing"))


def test_the_suite_runs_and_fails_where_one_check_does(monkeypatch, capsys):
    def wrong(*, implementation, v, **inputs):
        return momentum_delta_rule(v=v + v[:, -1:], **inputs, implementation="scan")

    monkeypatch.setattr(command, "interpreted_rule", wrong)
    config = CheckConfig(interpret=True, properties=True, only="decode-float32-(idle|causal)")
    with pytest.raises(SystemExit, match="1 checks wrong"):
        command.check(config)
    out = capsys.readouterr().out
    assert "ok   decode-float32-idle_steps\n" in out
    assert "FAIL decode-float32-causal\n     o: expected the same bits" in out
    assert "1 of 2 checks right" in out
