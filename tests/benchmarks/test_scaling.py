"""The numbers of docs/scaling.md are those of the code, and the code's those of the model."""

import re
from pathlib import Path

import pytest

import mdn_jax.ops.api as api
from benchmarks import residuals, scaling
from benchmarks.scaling import LONG_PLANS, PLANS, Plan, ScalingConfig
from configs import CONFIGS

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"


def plain(text):
    return re.sub(r"[ -]+", " ", text)


def test_the_document_has_the_tables_of_the_command():
    text = plain(DOCUMENT.read_text())
    for table in scaling.tables(ScalingConfig()):
        for line in table.splitlines():
            assert plain(line) in text, line


def test_the_parameters_are_those_of_the_shapes():
    n = scaling.size("7B")
    # q, k of 12 heads of 256, v, gate and output of twice that; the MLP; four gates of 12 heads
    block = 4096 * (2 * 3072 + 3 * 6144 + 3 * 11_008 + 4 * 12)
    assert n.matrices == 28 * block
    assert n.table == 50_257 * 4096
    small = n.total - n.matrices - 2 * n.table  # convolutions, norms, gates' own
    assert small == 28 * (4 * (2 * 3072 + 6144) + 2 * 4096 + 512 + 6 * 12) + 4096
    assert scaling.size("1.3B").total == pytest.approx(1.46e9, rel=0.01)


@pytest.mark.parametrize("remat", ["none", "states", "block"])
@pytest.mark.parametrize("name", ["mdn_400m", "mdn_1_3b"])
def test_kept_bytes_are_those_that_are_traced(monkeypatch, name, remat):
    monkeypatch.setattr(api, "_capability", lambda: (9, 0))  # the kernels are traced, not run
    config = CONFIGS[name]().model
    counted = 2 * 4096 * scaling.activation_bytes(config, remat)
    held = sum(x.size * x.dtype.itemsize for x in residuals.kept(config, remat, 2))
    assert counted == pytest.approx(held, rel=0.02)


def test_plans_fit_and_use_every_row():
    for plan in PLANS:
        assert plan.memory() < 76e9, plan
        assert plan.accumulation * plan.micro * plan.data * plan.fsdp == plan.rows, plan


def test_traffic_of_a_ring():
    n = scaling.size("1.3B")
    alone = Plan("1.3B", 1, 1, 1, rows=8, micro=4)
    assert alone.traffic() == {"fsdp": 0, "data": 0, "context": 0, "tensor": 0}
    sent = Plan("1.3B", 2, 1, 1, rows=8, micro=4).traffic()["data"]
    assert sent == pytest.approx(4 * n.total - 2 * n.matrices)  # half of the sums, twice
    sent = Plan("1.3B", 2, 1, 1, rows=16, micro=4).traffic()["data"]
    assert sent == pytest.approx(4 * n.total)  # once, of two micro-batches in float32
    # of a ring through 8 nodes of 8, one link in 8 leaves a node; across columns of it, every one
    ring, columns = Plan("1.3B", 64, 1, 1, 64, 1), Plan("1.3B", 8, 8, 1, 64, 1)
    assert ring.link_seconds("data", 8e9) == pytest.approx(1e9 / 50e9)
    assert columns.link_seconds("data", 8e9) == pytest.approx(8e9 / 50e9)
    assert columns.link_seconds("fsdp", 9e9) == pytest.approx(9e9 / 450e9)


def test_rows_over_devices():
    one, two, *_, eight = LONG_PLANS
    config = scaling.models()["400M"]
    heads, keys, values = config.value_heads, config.head_dim, config.head_v_dim
    # Phi and U of a head, float32, to the one other device, forward and backward
    maps = 4 * heads * (2 * keys * 2 * keys + 2 * keys * values)
    tails = 2 * config.conv_size * (2 * config.key_dim + config.value_dim)
    sent = two.traffic()["context"]
    assert sent == 8 * 2 * config.num_hidden_layers * (maps + tails)
    assert maps / heads == 2**19  # as docs/long_context.md says
    kept = [plan.activations() - 1.5 * 2**30 for plan in (one, two, eight)]
    assert kept[0] == pytest.approx(2 * kept[1]) == pytest.approx(8 * kept[2])
    assert one.traffic()["data"] == 0 < two.traffic()["data"] < eight.traffic()["data"]
    slower = two.seconds(0.35, 0.8)[0] / (one.seconds(0.35, 0.8)[0] / 2)
    assert 1.0 < slower < 1.2
