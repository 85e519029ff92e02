"""`python -m benchmarks two_devices` on what devices there are, and its count of collectives."""

import json

import pytest

from benchmarks import two_devices
from benchmarks.collectives import collectives, summary
from configs import CONFIGS
from mdn_jax import MDNConfig
from train.config import TrainConfig

PROGRAM = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %start = (f32[4,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%part), dimensions={0}
  %beside = f32[8,4]{1,0} fusion(%other), kind=kLoop, calls=%add
  %done = f32[8,4]{1,0} all-gather-done(%start)
  ROOT %next = (s32[], f32[8,4]) tuple(%i, %done)
}

%condition (state: (s32[], f32[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%wrapped (x: bf16[16]) -> bf16[8] {
  ROOT %scattered = bf16[8]{0} reduce-scatter(%x), dimensions={0}, to_apply=%add
}

ENTRY %main (p: f32[4,4]) -> f32[] {
  %loop = (s32[], f32[8,4]) while(%init), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %call = bf16[8]{0} call(%x), to_apply=%wrapped
  ROOT %total = f32[] all-reduce(%y), to_apply=%add
}
"""


def test_collectives_of_a_program():
    gathered, scattered, added = sorted(collectives(PROGRAM), key=lambda x: -x.bytes)
    assert gathered == ("all-gather", 8 * 4 * 4, False, True, 5, 1)
    assert scattered == ("reduce-scatter", 16, False, False, 1, None)
    assert added == ("all-reduce", 4, True, False, 1, None)
    total = summary([gathered, scattered, added])
    assert total["all-gather"] == {"times": 5, "bytes": 5 * 128, "waited for": 0}
    assert total["all-reduce"]["waited for"] == 1


@pytest.mark.slow
def test_a_mesh_of_one_device(tmp_path, monkeypatch, capsys):
    model = MDNConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_heads=1, head_dim=4, attn=None
    )
    run = TrainConfig(model=model, batch_size=4, accumulation=2, sequence_length=8)
    monkeypatch.setitem(CONFIGS, "tiny", lambda: run)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    output, text = tmp_path / "two.json", tmp_path / "text"
    config = two_devices.TwoDevicesConfig(
        model="tiny",
        devices=1,
        only=("data",),
        implementation="scan",
        steps=2,
        threads=1,
        compiled=tmp_path / "compiled",
        text=text,
        output=output,
    )
    two_devices.two_devices(config)
    assert "times one" in capsys.readouterr().out
    one, data = json.loads(output.read_text())["results"]
    assert one["ratio"] == 1.0
    assert data["ratio"] == pytest.approx(one["seconds"] / data["seconds"])
    assert data["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert {x.name for x in text.iterdir()} == {"one-device.hlo", "data.hlo"}


def test_what_does_not_fit_is_named():
    with pytest.raises(SystemExit, match="devices: expected at most 1, those of this process, got"):
        two_devices.two_devices(two_devices.TwoDevicesConfig(devices=64))
    with pytest.raises(ValueError, match=r"options: expected name=value .*, got 'fast'"):
        two_devices.TwoDevicesConfig(options=("fast",))
    assert two_devices.compiler_options("a=true,b=3") == {"a": True, "b": 3}
