"""The counts of docs/kernels.md and of section 6 of docs/algorithm.md, from the shapes."""

import jax.numpy as jnp
import pytest

from benchmarks.costs import STAGES, Cost, operator_cost, stage_costs
from pallas_kernels.momentum_delta.types import Sizes
from pallas_kernels.tiling import choose_tiles

H100 = "NVIDIA H100 80GB HBM3"
SIZES = Sizes(8, 4096, 6, 6, 6, 128, 256)
TILES = choose_tiles(128, 256, 2, (9, 0), heads=48)
# GFLOP, MB, floor in ms
DOCUMENTED = {
    "intra_chunk_fwd": (10, 215, 0.072),
    "state_fwd": (58, 715, 0.238),
    "output_fwd": (32, 690, 0.230),
    "dv_local_bwd": (6, 226, 0.075),
    "state_bwd": (84, 866, 0.289),
    "inter_chunk_bwd": (77, 1353, 0.451),
    "recompute_gamma": (0.4, 38, 0.013),
    "intra_chunk_bwd": (29, 698, 0.233),
    "gate_bwd": (1.6, 89, 0.030),
}


def test_stages_as_documented():
    costs = stage_costs(SIZES, "bfloat16", TILES)
    assert tuple(costs) == tuple(DOCUMENTED) == STAGES
    for name, (gflop, megabytes, floor) in DOCUMENTED.items():
        cost = costs[name]
        assert cost.flops / 1e9 == pytest.approx(gflop, abs=0.5), name
        assert cost.bytes / 1e6 == pytest.approx(megabytes, abs=0.5), name
        assert cost.floor(H100, "bfloat16") * 1e3 == pytest.approx(floor, abs=0.001), name


def test_operator_as_documented():
    forward = operator_cost(SIZES, "bfloat16")
    both = operator_cost(SIZES, "bfloat16", backward=True)
    assert forward.floor(H100, "bfloat16") == pytest.approx(0.14e-3, abs=0.01e-3)
    assert both.floor(H100, "bfloat16") == pytest.approx(0.43e-3, abs=0.01e-3)
    assert forward.bytes / 3.0e12 == pytest.approx(0.10e-3, abs=0.01e-3)
    # the forward kernels do nothing twice, and gamma and X half by half
    costs = stage_costs(SIZES, "bfloat16", TILES)
    kernels = sum(costs[name].flops for name in STAGES[:3])
    squares = 8 * 6 * 64 * 2 * 64**3
    assert forward.flops - kernels == (11 - 2.5) * squares


def test_the_gated_delta_rule_is_half():
    """In the states; the rest is the same but for gamma."""
    momentum = operator_cost(SIZES, "bfloat16").flops
    without = operator_cost(SIZES, "bfloat16", momentum=False).flops
    tokens = 8 * 4096 * 6
    assert momentum - without == tokens * (6 * 128 * 256 + 2 * 64 * 64)


def test_erase_keys_cost_their_bytes():
    tiles = choose_tiles(128, 256, 2, (9, 0), explicit_p=True, heads=48)
    without, given = (stage_costs(SIZES, "bfloat16", tiles, explicit_p=p) for p in (False, True))
    keys = 8 * 4096 * 6 * 128 * 2
    extra = {name: given[name].bytes - without[name].bytes for name in STAGES}
    assert {name for name in STAGES if extra[name] == keys} == {"state_fwd", "state_bwd"}
    # read, and written in float16; read, and their gradients written
    assert extra["intra_chunk_fwd"] == extra["inter_chunk_bwd"] == 2 * keys
    assert extra["intra_chunk_bwd"] == 3 * keys + 8 * 4096 * 6 * 4
    whole = operator_cost(SIZES, "bfloat16", explicit_p=True).bytes
    assert whole - operator_cost(SIZES, "bfloat16").bytes == keys


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "bfloat16"), (H100, "float32")])
def test_no_floor_where_the_peak_is_unknown(device, dtype):
    assert Cost(1, 1).floor(device, jnp.dtype(dtype)) is None
