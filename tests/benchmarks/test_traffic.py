"""The arrays between the kernels are those that the costs count."""

import pytest

from benchmarks import costs
from benchmarks.traffic import KERNELS, traffic
from pallas_kernels.tiling import choose_tiles


@pytest.mark.parametrize(
    "shape", [(8, 4096, 6, 128, 256), (4, 4096, 6, 256, 512), (2, 128, 3, 16, 64)]
)
def test_each_kernel_moves_what_its_cost_says(shape):
    batch, length, heads, key_dim, value_dim = shape
    tiles = choose_tiles(key_dim, value_dim, 2, (9, 0), heads=batch * heads)
    sizes = costs.Sizes(batch, length, heads, heads, heads, key_dim, value_dim)
    counted = costs.stage_costs(sizes, "bfloat16", tiles, storage="float16")
    moved = traffic(*shape)
    assert [x.bytes for x in moved.values()] == [x.bytes for x in counted.values()]


def test_every_array_is_written_once_and_before_it_is_read():
    written = {"q", "k", "v", "gates", "three_gates", "initial", "d_o", "d_final"}
    written |= {"column_scales", "column_scales_2"}  # by XLA, between the kernels
    for reads, writes in KERNELS.values():
        assert set(reads.split()) <= written
        assert not set(writes.split()) & written
        written |= set(writes.split())
