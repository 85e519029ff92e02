"""`python -m benchmarks decode` at a tiny size: right implementations are timed, others are not."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import decode as command
from benchmarks.decode import DecodeConfig

TINY = {"shapes": ("2,1,16,16",), "implementations": ("xla",), "loop": 3, "runs": 2}


def test_rows_and_json(tmp_path, capsys):
    output = tmp_path / "decode.json"
    command.decode(DecodeConfig(**TINY, tokens=2, dtype="float32", output=output))
    table = capsys.readouterr().out
    assert "| 2,1,16,16 | xla " in table
    assert "| copy " in table
    rows = json.loads(output.read_text())["results"]
    assert [row["name"] for row in rows] == ["xla", "copy"]
    moved = 2 * 2 * 4 * 2 * 16 * 16  # both states, read and written, float32, two heads
    for row in rows:
        assert row["bandwidth"] * row["median"] == pytest.approx(moved)
    assert rows[0]["error"] <= 1e-5


def test_states_of_16_bits_and_replay(tmp_path, capsys):
    output = tmp_path / "decode.json"
    command.decode(DecodeConfig(**TINY, state_dtype="bfloat16", replay=2, output=output))
    assert "bfloat16 states" in capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads(output.read_text())["results"]}
    assert list(rows) == ["xla", "xla, replay 2", "copy"]
    states = 2 * 2 * 2 * 16 * 16  # both, read, of 16 bits, two heads
    assert rows["xla"]["moved"] == 2 * states
    # written and read again every second call; 2.5 of the ring's 4 slots on average
    ring = 2 * 4 * (2 * 16 + 4 * 16 + 16) + 2 * 8
    assert rows["xla, replay 2"]["moved"] == 2 * states + ring * 1.25 / 2


def test_other_tiles_are_those_of_the_kernels(monkeypatch, capsys):
    seen = []
    chosen = command.kernel_api.decode_tiles
    monkeypatch.setattr(
        command,
        "_run_shape",
        lambda *_: seen.append(command.kernel_api.decode_tiles(1, 1, 1)) or ([], []),
    )
    command.decode(DecodeConfig(**TINY, tiles=("32,4", "64,8")))
    assert seen == [(32, 4), (64, 8)]
    assert command.kernel_api.decode_tiles is chosen
    with pytest.raises(SystemExit, match="tiles: expected block_v,warps such as 64,8: 64"):
        command.decode(DecodeConfig(**TINY, tiles=("64",)))


def test_wrong_steps_are_not_timed(monkeypatch, capsys):
    def wrong(*, implementation, **inputs):
        o, state = right(**inputs, implementation=implementation)
        return o if implementation == "scan" else 1.02 * o, state

    right = command.momentum_delta_rule
    monkeypatch.setattr(command, "momentum_delta_rule", wrong)
    with pytest.raises(SystemExit):
        command.decode(DecodeConfig(**TINY, dtype="float32"))
    out = capsys.readouterr().out
    assert "xla at 2,1,16,16 is not timed: ValueError: relative error 2.0e-02" in out
    assert "| xla" not in out


def test_what_cannot_run_is_said_and_the_rest_is_timed(capsys):
    with pytest.raises(SystemExit):
        command.decode(DecodeConfig(**(TINY | {"implementations": ("pallas_triton", "xla")})))
    out = capsys.readouterr().out
    assert "pallas_triton at 2,1,16,16 is not timed" in out
    assert "a CUDA GPU" in out
    assert "| xla " in out


def test_states_are_donated_not_lost():
    """The loop runs on its own copy: the next implementation starts from the same states."""
    state = command.MDNState(jnp.ones((1, 1, 2, 2)), jnp.ones((1, 1, 2, 2)))
    config = DecodeConfig(**TINY)
    command._time(config, lambda state: (jnp.zeros(()), state), state)
    assert float(state.s.sum()) == 4.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 17}, "tokens: expected 1 to 16, got 17"),
        ({"runs": 1}, "runs: expected"),
        ({"replay": 3}, "replay: expected 2, 4, 8 or 16 with tokens = 1, got 3"),
    ],
)
def test_bad_options(change, words):
    with pytest.raises(ValueError, match=words):
        DecodeConfig(**change)


def test_bad_shape():
    with pytest.raises(SystemExit, match="expected B,H,K,V such as 64,6,128,256: 1,2"):
        command.decode(DecodeConfig(shapes=("1,2",)))
