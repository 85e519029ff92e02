"""What `python -m benchmarks decoding` does without a GPU."""

import pytest

from benchmarks.decoding import DecodingConfig, Row, decoding, table
from benchmarks.decoding_cases import others
from pallas_kernels.decoding import product_tiles


def test_without_a_gpu_it_says_what_it_expects():
    with pytest.raises(SystemExit, match="model: the kernels expect a CUDA GPU, got none"):
        decoding(DecodingConfig(model="smoke"))


def test_other_tiles_are_others_and_divide_the_width():
    for batch in (1, 8, 64):
        for sizes in ((4632, 1024, 2, 1), (2816, 1024, 2, 2), (1024, 2816, 2, 1), (48, 48, 4, 1)):
            outputs, width, itemsize, matrices = sizes
            tiles = list(others(batch, *sizes))
            shipped = product_tiles(batch, outputs, width, itemsize, matrices=matrices)
            assert tiles
            assert shipped not in tiles
            for choice in tiles:
                assert width % (choice.width * choice.at_once) == 0
                # of the pipeline in shared memory
                staged = (choice.rows + matrices * choice.outputs) * choice.width * itemsize
                assert not choice.dot or staged * choice.stages <= 232_448


def test_the_table_has_floors_of_a_known_device():
    row = Row(1, "mdn_decode_up", "shipped", 5e-6, 8_200_000, 21)
    assert "| 2.00 " in table([row], "NVIDIA H200").splitlines()[-1]
    assert "| 105 " in table([row], "cpu").splitlines()[-1]
