"""`mdn-bench stages` in the interpreter: the chain is right, or is not timed."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import stages as command
from benchmarks.costs import STAGES, Cost
from benchmarks.reference import scan_outputs_and_gradients
from benchmarks.stages import StagesConfig, several
from benchmarks.timing import Timing

TINY = StagesConfig(shape=(1, 128, 1, 16, 16), dtype="float32", runs=2, interpret=True)


def with_(**changes):
    return StagesConfig(**(vars(TINY) | changes))


@pytest.mark.slow
def test_every_kernel_is_timed(tmp_path, capsys):
    output = tmp_path / "stages.json"
    command.stages(with_(output=output, explicit_p=True))
    out = capsys.readouterr().out
    for name in (*STAGES, "forward + backward", "GFLOP", "x floor"):
        assert f"| {name} " in out or f" {name} |" in out, name
    record = json.loads(output.read_text())
    assert tuple(record["results"]) == STAGES
    assert record["errors"]["gradient"] <= 1e-5
    assert all(row["median"] > 0 for row in record["results"].values())

    command.stages(with_(output=output, dtype="bfloat16", precise=True))
    assert "bfloat16, precise, interpreted" in capsys.readouterr().out
    bytes_of = {name: x["bytes"] for name, x in json.loads(output.read_text())["results"].items()}
    command.stages(with_(output=output, dtype="bfloat16"))
    narrow = {name: x["bytes"] for name, x in json.loads(output.read_text())["results"].items()}
    kept = 2 * (128 // 64) * 16 * 16 * 2
    error, matrices = 128 * 16 * 2, 2 * 64 * 64 * 2
    # of float16: float32 for each chunk and column of V, and keys
    units, keys = 2 * 16 * 4, 128 * 16 * 2
    extra = {name: bytes_of[name] - narrow[name] for name in STAGES}
    assert extra == {
        "intra_chunk_fwd": 2 * matrices - keys,
        "state_fwd": matrices + error + kept,
        "output_fwd": matrices + error + kept,
        "dv_local_bwd": matrices + error,
        "state_bwd": matrices + 2 * error + kept,
        "inter_chunk_bwd": 2 * error + 2 * kept - 4 * units,
        "recompute_gamma": matrices,
        "intra_chunk_bwd": 3 * matrices + 2 * error - 2 * units,
        "gate_bwd": 2 * matrices,
    }


def test_no_call_of_several_is_left_out():
    """Nor are equal ones made one, as the compiler does where nothing tells them apart."""
    x, y = jnp.ones((8, 16)), {"y": jnp.ones((16, 4)), "not in use": jnp.ones(1)}
    program, arguments = several(lambda x, y: jnp.sin(x) @ y["y"], (x, y), 3)
    compiled = jax.jit(program).lower(*arguments).compile()
    assert len(re.findall(r" (?:dot|custom-call)\(", compiled.as_text())) == 3
    for result in compiled(*arguments):
        np.testing.assert_allclose(result, 16 * np.sin(1.0), rtol=1e-6)


def test_wrong_kernels_are_not_timed(monkeypatch):
    def wrong(x, initial, cotangent, options):
        inputs = x._asdict() | {"initial_state": initial}
        (o, state), gradients = jax.jit(scan_outputs_and_gradients)(inputs, cotangent)
        return [], ((o, state), gradients | {"v": 1.01 * gradients["v"]})

    monkeypatch.setattr(command, "run_stages", wrong)
    monkeypatch.setattr(command, "measure_compiled", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(SystemExit, match=r"gradients 1.0e-02 \(v\) .* not timed"):
        command.stages(with_(explicit_p=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": (1, 100, 1, 16, 16)}, "multiple of 64"),
        ({"shape": (1, 128, 1, 24, 16)}, r"such as \(32, 16\)"),
        ({"shape": (1, 64, 1, 16, 1024)}, "V at most 512"),
        ({"precise": True}, "precise: expected bfloat16 and compute capability 9.0, got float32"),
    ],
)
def test_shapes_that_kernels_cannot_run(change, words):
    with pytest.raises(SystemExit, match=words):
        command.stages(with_(**change))


def test_a_cpu_is_told_of_the_interpreter(monkeypatch):
    monkeypatch.setattr(command.api, "_capability", lambda: None)
    with pytest.raises(SystemExit, match="a CUDA GPU, got none; --interpret"):
        command.stages(with_(interpret=False))


def test_a_table_of_some_kernels():
    """Sums stand there only where all their parts do."""
    timing = Timing(median=1e-3, spread=0.0, compile=1.0, memory=0, peak=None, calls=4)
    costs = {name: Cost(10**9, 10**6) for name in STAGES}
    one, forward = (
        command.table(costs, dict.fromkeys(names, timing), "cpu", "bfloat16")
        for names in (STAGES[2:3], STAGES[:3])
    )
    assert "output_fwd" in one
    assert "state_fwd" not in one
    assert "forward" not in one
    assert "| forward " in forward
    assert "backward" not in forward
