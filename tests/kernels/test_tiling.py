"""Tile choices fit every shape, and what the kernels cannot run is named."""

from itertools import product

import pytest

from pallas_kernels.tiling import (
    KEY_DIMS,
    MAX_KEY_DIM,
    MAX_VALUE_DIM,
    SHARED_MEMORY,
    choose_tiles,
    padded_key_dim,
    padded_value_dim,
    unsupported,
)

VALUE_DIMS = sorted({padded_value_dim(size) for size in range(1, MAX_VALUE_DIM + 1)})


@pytest.mark.parametrize(
    ("size", "key_dim", "value_dim"),
    [
        (1, 16, 16),
        (16, 16, 16),
        (17, 32, 32),
        (40, 64, 64),
        (128, 128, 128),
        (129, 256, 256),
        (256, 256, 256),
    ],
)
def test_padded_dims(size, key_dim, value_dim):
    assert padded_key_dim(size) == key_dim
    assert padded_value_dim(size) == value_dim


def test_padded_dims_above_128():
    assert VALUE_DIMS == [16, 32, 64, 128, 256, 384, 512]
    assert [padded_value_dim(size) for size in (257, 384, 385, 512)] == [384, 384, 512, 512]


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(("itemsize", "precise"), [(2, False), (2, True), (4, False)])
@pytest.mark.parametrize("explicit_p", [False, True])
def test_tiles_divide_every_padded_shape(explicit_p, itemsize, precise, capability):
    for key_dim, value_dim, heads in product(KEY_DIMS, VALUE_DIMS, (1, 200)):
        tiles = choose_tiles(
            key_dim, value_dim, itemsize, capability, explicit_p, precise, heads=heads
        )
        for name, size in tiles._asdict().items():
            if name.endswith("_block_v"):
                assert size >= 16, name
                assert value_dim % size == 0, name
            elif name.endswith("_block_k"):
                assert key_dim % min(size, key_dim) == 0, name
            elif name.endswith("_warps"):
                assert size in (1, 2, 4, 8, 16), name
            elif name.endswith("_resident"):
                assert size is None or size >= 1, name
            else:
                assert size in (1, 2, 3, 4), name


def test_few_walks_take_narrow_tiles():
    few, many = (choose_tiles(128, 256, 2, (9, 0), heads=heads) for heads in (8, 9))
    assert (few.state_fwd_block_v, few.state_bwd_block_v) == (16, 16)
    assert (many.state_fwd_block_v, many.state_bwd_block_v) == (32, 32)
    # 8 heads of 256 values are 128 blocks of 16, for 132 multiprocessors
    assert few == many._replace(state_fwd_block_v=16, state_fwd_stages=4, state_bwd_block_v=16)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_supported(capability):
    assert unsupported(1, 1, capability) is None
    assert unsupported(MAX_KEY_DIM, MAX_VALUE_DIM, capability) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((257, 64, (9, 0)), ["K at most 256", "257"]),
        ((64, 513, (9, 0)), ["V at most 512", "513"]),
        ((64, 64, (8, 6)), ["8.0", "9.0", "got 8.6"]),
        ((64, 64, (7, 5)), ["got 7.5"]),
        ((64, 64, None), ["CUDA GPU", "none"]),
    ],
)
def test_unsupported(arguments, words):
    reason = unsupported(*arguments)
    for word in words:
        assert word in reason, reason


def test_unsupported_with_an_erase_key_of_its_own():
    assert unsupported(256, 512, (9, 0), itemsize=2, explicit_p=True) is None
    assert unsupported(256, 512, (9, 0), itemsize=4, explicit_p=True) is None
    assert unsupported(128, 512, (8, 0), itemsize=4, explicit_p=True) is None
    assert "K at most 128" in str(unsupported(256, 16, (8, 0), itemsize=4, explicit_p=True))
