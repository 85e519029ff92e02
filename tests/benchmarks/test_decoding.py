"""What `python -m benchmarks decoding` does without a GPU."""

import numpy as np
import pytest

from benchmarks.decoding import DecodingConfig, Row, decoding, table
from benchmarks.decoding_cases import near, near_mixer
from benchmarks.decoding_check import NOTHING, compared, described
from pallas_kernels.decoding import product_tiles
from pallas_kernels.decoding.tiles import mixer_tiles


def test_without_a_gpu_it_says_what_it_expects():
    with pytest.raises(SystemExit, match="model: the kernels expect a CUDA GPU, got none"):
        decoding(DecodingConfig(model="smoke"))


def test_other_tiles_are_others_and_divide_the_width():
    for batch in (1, 8, 64):
        for sizes in ((4632, 1024, 2, 1), (2816, 1024, 2, 2), (1024, 2816, 2, 1), (48, 48, 4, 1)):
            outputs, width, itemsize, matrices = sizes
            tiles = list(near(batch, *sizes))
            shipped = product_tiles(batch, outputs, width, itemsize, matrices=matrices)
            assert tiles
            assert shipped not in tiles
            for choice in tiles:
                assert width % (choice.width * choice.at_once) == 0
                # of the pipeline in shared memory
                staged = (choice.rows + matrices * choice.outputs) * choice.width * itemsize
                assert not choice.dot or staged * choice.stages <= 232_448


def test_other_tiles_of_the_mixer_are_others_and_divide_v():
    for heads in (6, 48, 384):
        tiles = list(near_mixer(128, 256, heads))
        assert tiles
        assert mixer_tiles(128, 256, heads) not in tiles
        assert all(256 % choice.block_v == 0 for choice in tiles)


def test_the_table_has_floors_of_a_known_device():
    row = Row(1, "mdn_decode_up", "shipped", 5e-6, 8_200_000, 21)
    assert "| 2.00 " in table([row], "NVIDIA H200").splitlines()[-1]
    assert "| 105 " in table([row], "cpu").splitlines()[-1]


def checked(*tokens):
    """What a check says of the logits `[B, vocab]` of kernels, layers and float32 at each token."""
    found = NOTHING
    for token in tokens:
        found, taken = compared(found, *(np.asarray(x, np.float32) for x in token))
    np.testing.assert_array_equal(taken, np.argmax(tokens[-1][-1], axis=-1))
    return found


def test_a_check_finds_other_tokens_and_larger_errors():
    logits = np.asarray([[0.0, 1.0, 0.5], [3.0, 0.0, 0.5]])
    near = logits + np.asarray([[0, 1e-3, 0], [0, 0, 1e-3]])
    line, right = described(checked((near, near, logits), (logits,) * 3), 2, 2, is_exact=False)
    assert right
    assert "those of the layers 3." in line
    assert "from each other at most 0.0e+00 (0.02 met)" in line
    assert line.endswith("the likeliest token is the same in 4 of 4")
    # further from float32 than the layers are, and further from them than asked for
    far = logits + np.asarray([[0, -0.3, 0], [0, 0, 0]])
    found = checked((far, near, logits))
    line, right = described(found, 2, 1, is_exact=False)
    assert not right
    assert "(0.02 missed)" in line
    assert line.endswith("WRONG, expected at most 1.2 times the layers'")
    difference = np.log(np.exp(far).sum(1)) - np.log(np.exp(near).sum(1))
    apart = np.abs(far - near - difference[:, None])
    np.testing.assert_allclose(found.apart, apart.max(), rtol=1e-4)
    np.testing.assert_allclose(found.taken, apart[[0, 1], [1, 0]].max(), rtol=1e-4)


def test_in_float32_one_other_token_is_wrong():
    layers = np.asarray([[0.0, 1.0, 1.0 - 1e-6]])
    kernels = np.asarray([[0.0, 1.0 - 1e-6, 1.0]])
    line, right = described(checked((kernels, layers, layers)), 1, 1, is_exact=True)
    assert not right
    assert "the same in 0 of 1, where it is not it leads by at most 1.0e-06" in line
    assert line.endswith("WRONG, expected the same tokens in float32")
