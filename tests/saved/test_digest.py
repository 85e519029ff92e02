"""Digests see every bit and the order, and do not see how an array is cut or where it lies."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mdn_jax.saved.digest import NEW, OLD, Digests, _on_devices, digests, json_digest


def digest(x, kind=NEW):
    return digests({"x": x}, kind=kind).arrays["x"]


def compiled_digest(x, kind=NEW):
    """As of an array on an accelerator."""
    return int(_on_devices(jnp.asarray(x), kind))


def random(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def reordered(x):
    """The array in orders of its own entries, each another array."""
    flat = x.reshape(-1)
    swapped = flat.copy()
    swapped[[1, -2]] = swapped[[-2, 1]]
    rng = np.random.default_rng(1)
    orders = flat[::-1], np.roll(flat, 1), rng.permutation(flat), np.sort(flat), swapped
    return [order.reshape(x.shape) for order in orders]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("shape", [(23,), (5, 7), (2, 3, 4), (300, 257)])
def test_order_is_seen(shape, dtype):
    x = random(shape, dtype)
    others = reordered(x)
    if len(shape) == 2:
        others += [x[::-1], x[:, ::-1], x.reshape(shape[::-1])]
    assert digest(x) not in map(digest, others)
    assert {digest(y, OLD) for y in others} == {digest(x, OLD)}  # why there is another kind


def test_order_of_equal_and_round_values_is_seen():
    x = np.zeros((64, 48), np.float32)
    seen = set()
    for i, j in np.ndindex(64, 48):  # the only 1 among zeros, everywhere
        x[i, j] = 1
        seen.add(digest(x))
        x[i, j] = 0
    assert len(seen) == 64 * 48
    x[:, ::2] = 2.0
    assert len({digest(np.roll(x, shift, axis=1)) for shift in (0, 1)}) == 2


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int32, np.uint8])
def test_every_bit_is_seen(dtype):
    x = random((3, 4), np.float32).astype(dtype)
    expected = digest(x)
    data = bytearray(x.tobytes())
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        assert digest(np.frombuffer(bytes(data), dtype).reshape(3, 4)) != expected
        data[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("kind", [OLD, NEW])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((), np.int32),
        ((0,), np.float32),
        ((3, 0), np.float32),
        ((9,), np.uint8),
        ((2, 3, 5), ml_dtypes.bfloat16),
        ((3, 40_000), np.float32),
        ((70_000,), np.float32),
        ((70_000, 1), np.float16),
    ],
)
def test_host_and_device_agree(shape, dtype, kind):
    x = (100 * random(shape, np.float64)).astype(dtype)
    assert compiled_digest(x, kind) == digest(x, kind) == digest(jnp.asarray(x), kind)
    if x.ndim > 1:  # in another order in memory
        assert digest(np.asfortranarray(x), kind) == digest(x, kind)


def test_host_and_device_agree_on_words_of_eight_bytes(x64):
    x = random((4, 5), np.float64)
    assert compiled_digest(x) == digest(x) == digest(jnp.asarray(x))
    assert digest(x[::-1]) != digest(x)


def test_values_of_checkpoints_do_not_change():
    """What is in files that people have."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert digest(x, OLD) == sum(int(word) for word in x.view(np.uint32).flat) % 2**32
    assert digest(x, NEW) == 4083057560
    assert json_digest({"b": [1, 2.5], "a": None}) == (
        "6b1d84977084473f4b3b012fc8f1d08257499895d136f26cc7b5c865d2f19e23"
    )


def test_a_check_names_the_arrays():
    tree = {"a": random((4,), np.float32), "b": {"c": random((4,), np.float32, seed=1)}}
    expected = digests(tree)
    expected.check(tree)
    expected.check({"b": tree["b"]})
    tree["b"]["c"] = tree["b"]["c"][::-1]
    with pytest.raises(ValueError, match=r"wrong digests of 1 array\(s\): b\.c"):
        expected.check(tree)
    with pytest.raises(ValueError, match=r"wrong digests of 1 array\(s\): d"):
        expected.check({"d": tree["a"]})
    with pytest.raises(ValueError, match="a kind that is not known: 'crc'"):
        Digests("crc", {}).check(tree)


def test_json_digests_see_values_not_their_writing():
    assert json_digest({"a": (1, 2), 3: "x"}) == json_digest({"3": "x", "a": [1, 2]})
    values = {"step": 40, "parts": [{"pass": 0}]}
    changes = {"step": 44}, {"parts": []}, {"parts": [{"pass": 1}]}, {"more": None}
    assert json_digest(values) not in {json_digest(values | change) for change in changes}


def test_arrays_on_devices_and_on_the_host_in_one_tree():
    x = random((3, 4), np.float32)
    mixed = digests([x, jnp.asarray(x), jax.device_put(x[0])])
    assert mixed.arrays["0"] == mixed.arrays["1"] == digest(x)
    assert mixed.arrays["2"] == digest(x[0])
