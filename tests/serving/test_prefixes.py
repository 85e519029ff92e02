"""States by prefix: the longest that is there, within a bound, and on the disk."""

import jax
import numpy as np
import pytest

from mdn_jax.models import prefill
from mdn_jax.serving.prefixes import PrefixCache
from mdn_jax.text.text import ByteText

TOKENS = ByteText().encode("a prompt that many share")


@pytest.fixture(scope="module")
def state(model):
    return prefill(model, [TOKENS])


def test_the_longest_beginning_is_found(state):
    cache = PrefixCache(1 << 20)
    assert cache.find(TOKENS) == (0, None, 0)
    cache.put(TOKENS[:5], state)
    cache.put(TOKENS[:9], state)
    cache.put([*TOKENS[:9], 1], state)
    assert cache.find(TOKENS)[:2] == (9, state)
    assert cache.find(TOKENS[:9])[0] == 9
    assert cache.find(TOKENS[:8])[0] == 5
    assert cache.find([1, 2]) == (0, None, 0)


def test_where_prompts_part_is_told_once_it_is_worth_it(state):
    cache = PrefixCache(1 << 20)
    cache.put(TOKENS, state)
    assert cache.find([*TOKENS[:20], 1, 2]).branch == 20
    assert cache.find([*TOKENS[:10], 1, 2]).branch == 0
    assert cache.find(TOKENS[:20]).branch == 0  # its end is kept anyway
    cache.put(TOKENS[:15], state)
    assert cache.find([*TOKENS[:20], 1, 2]) == (15, state, 0)


def test_the_least_used_go_first(state):
    one = PrefixCache(1 << 20)
    one.put([1], state)
    cache = PrefixCache(3 * one.size)
    for first in (1, 2, 3):
        cache.put([first], state)
    assert len(cache) == 3
    cache.find([1, 9])
    cache.put([4], state)
    assert [cache.find([first]).length for first in (1, 2, 3, 4)] == [1, 0, 1, 1]
    assert cache.size == 3 * one.size
    cache.put([4], state)
    assert cache.size == 3 * one.size
    cache.put(list(range(1 << 16)), state)
    assert len(cache) == 3  # larger than all there is room for
    nothing = PrefixCache(0)
    nothing.put([1], state)
    assert len(nothing) == nothing.size == 0


def test_states_come_back_from_a_directory(state, model, tmp_path, caplog):
    directory = tmp_path / "kept"
    cache = PrefixCache(1 << 20)
    cache.put(TOKENS, state)
    cache.put(TOKENS[:4], prefill(model, [TOKENS[:4]]))
    cache.save(directory, model)
    assert directory.stat().st_mode & 0o077 == 0
    again = PrefixCache(1 << 20)
    again.load(directory, model, lambda x: x)
    found = again.find([*TOKENS, 5])
    assert found.length == len(TOKENS)
    for ours, theirs in zip(jax.tree.leaves(found.state), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours, theirs)

    files = sorted(directory.glob("*.npz"))
    files[0].write_bytes(files[0].read_bytes()[:-9])
    files[1].rename(files[0].with_name("lost.npz"))
    damaged = PrefixCache(1 << 20)
    damaged.load(directory, model, lambda x: x)
    assert len(damaged) == 0
    assert caplog.text.count("a state was left out") == 2
    cache.save(directory, model)
    assert not (directory / "lost.npz").exists()


def test_a_state_of_other_tokens_is_left_out(state, model, tmp_path, caplog):
    cache = PrefixCache(1 << 20)
    cache.put(TOKENS[:-1], state)  # as if files had been exchanged
    cache.save(tmp_path, model)
    again = PrefixCache(1 << 20)
    again.load(tmp_path, model, lambda x: x)
    assert len(again) == 0
    assert f"expected {len(TOKENS) - 1} tokens, got others" in caplog.text


@pytest.mark.parametrize("text", ["", "[", "[]", '{"format": 1}', '{"prefixes": [["a"]]}'])
def test_an_index_that_is_none(text, model, tmp_path):
    (tmp_path / "prefixes.json").write_text(text)
    with pytest.raises(ValueError, match=r"prefix_dir: expected prefixes\.json of a server"):
        PrefixCache(1).load(tmp_path, model, lambda x: x)


def test_no_directory_is_no_states(model, tmp_path):
    cache = PrefixCache(1)
    cache.load(tmp_path / "none", model, lambda x: x)
    assert len(cache) == 0
