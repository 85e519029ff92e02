"""Samplers against numpy, and their statistics."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdn_jax import Sampling
from mdn_jax.models.sampling import GREEDY, PLAIN, RANKED, needed, sampling_arrays
from mdn_jax.models.sampling import draw as draw_arrays
from mdn_jax.models.sampling import filtered_logits as filtered_arrays

VOCAB = 13
RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(3 * RNG.normal(size=(3, VOCAB)), jnp.float32)
SEEN = jnp.asarray(RNG.random((3, VOCAB)) < 0.4)


def arrays(logits, sampling, seeds=0):
    rows, vocab = logits.shape
    return sampling_arrays(sampling, rows, vocab_size=vocab, seed=seeds, dtype=logits.dtype)


def filtered_logits(logits, seen, sampling):
    return jit_filtered(logits, seen, arrays(logits, sampling))


def draw(logits, seen, seeds, position, sampling):
    return jit_draw(logits, seen, position, arrays(logits, sampling, seeds))


jit_filtered, jit_draw = jax.jit(filtered_arrays), jax.jit(draw_arrays)


def naive(logits, seen, sampling):
    """Probabilities of one row, with loops."""
    x = [float(value) for value in logits]
    limit = sampling.vocab_limit or len(x)
    for i in range(len(x)):
        x[i] += (sampling.logit_bias or {}).get(i, 0.0)
        if i >= limit:
            x[i] = -np.inf
        elif seen[i]:
            x[i] = (
                x[i] / sampling.repetition_penalty
                if x[i] > 0
                else x[i] * (sampling.repetition_penalty)
            )
    if sampling.temperature == 0:
        return np.eye(len(x))[int(np.argmax(x))]
    weights = np.exp((np.array(x) - max(x)) / sampling.temperature)
    kept, total = [], 0.0
    ranked = sorted(range(len(x)), key=lambda i: (-weights[i], i))
    ranked = ranked[: sampling.top_k or len(x)]
    for i in ranked:
        if total / weights[ranked].sum() < sampling.top_p:
            kept.append(i)
        total += weights[i]
    kept = [i for i in kept if weights[i] >= sampling.min_p * max(weights)]
    p = np.zeros(len(x))
    p[kept] = weights[kept]
    return p / p.sum()


@given(
    st.builds(
        Sampling,
        vocab_limit=st.sampled_from([None, 1, 7]),
        repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
        temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
        top_k=st.sampled_from([None, 1, 4, 50]),
        top_p=st.sampled_from([1.0, 0.8, 0.3, 1e-6]),
        min_p=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
        logit_bias=st.sampled_from([None, {0: 4.0, 3: -100.0, 6: -1.5}]),
    )
)
def test_filters_against_numpy(sampling):
    probabilities = jax.nn.softmax(filtered_logits(LOGITS, SEEN, sampling), axis=-1)
    for row in range(3):
        expected = naive(LOGITS[row], SEEN[row], sampling)
        np.testing.assert_allclose(probabilities[row], expected, atol=1e-6)


def test_ties_go_to_the_lower_id():
    equal = jnp.zeros((1, 6))
    seen = jnp.zeros((1, 6), bool)
    kept = jnp.isfinite(filtered_logits(equal, seen, Sampling(top_k=2)))
    np.testing.assert_array_equal(kept[0], [1, 1, 0, 0, 0, 0])
    kept = jnp.isfinite(filtered_logits(equal, seen, Sampling(top_p=0.5)))
    np.testing.assert_array_equal(kept[0], [1, 1, 1, 0, 0, 0])


EDGES = [2e-38, 1.2e-38, 3e-39, 7e-46, 1e-310, 5e-324]


@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.5}, {"vocab_limit": VOCAB - 1}])
@pytest.mark.parametrize("temperature", EDGES)
def test_the_smallest_temperatures_take_the_likeliest(temperature, filters):
    limit = filters.get("vocab_limit", VOCAB)
    seeds, position = jnp.arange(3, dtype=jnp.uint32), jnp.arange(3)
    tokens = draw(LOGITS, SEEN, seeds, position, Sampling(temperature=temperature, **filters))
    np.testing.assert_array_equal(tokens, np.argmax(LOGITS[:, :limit], axis=-1))


def test_the_largest_temperature_takes_any_of_the_vocabulary():
    sampling = Sampling(temperature=1.7e308, vocab_limit=5, top_k=2**40)
    probabilities = jax.nn.softmax(filtered_logits(LOGITS, SEEN, sampling), axis=-1)
    np.testing.assert_allclose(probabilities, [[0.2] * 5 + [0.0] * (VOCAB - 5)] * 3, atol=1e-6)


@pytest.mark.parametrize("top_p", [1e-30, 1e-300, 5e-324])
def test_the_smallest_top_p_keeps_the_likeliest(top_p):
    kept = jnp.isfinite(filtered_logits(LOGITS, SEEN, Sampling(top_p=top_p)))
    assert kept.sum(axis=-1).tolist() == [1, 1, 1]
    np.testing.assert_array_equal(np.argmax(kept, axis=-1), np.argmax(LOGITS, axis=-1))


@pytest.mark.parametrize("penalty", [1e-320, 1e-50, 1e50, 1.7e308])
def test_any_penalty_leaves_numbers(penalty):
    seen = jnp.asarray([[True, True, False, True]])
    logits = jnp.asarray([[2.0, 0.0, 1.0, -1.0]])
    filtered = filtered_logits(logits, seen, Sampling(repetition_penalty=penalty))
    assert int(jnp.argmax(filtered)) == (0 if penalty < 1 else 2)
    assert not jnp.isnan(filtered).any()


def test_nothing_is_drawn_from_logits_that_are_not_finite():
    inf = jnp.inf
    logits = [[0.0, jnp.nan, 1.0], [inf, 0.0, 0.0], [-inf, -inf, -inf], [-inf, 2.0, 0.0]]
    for sampling in (Sampling(), Sampling(temperature=0.0), Sampling(top_k=1, top_p=0.1)):
        tokens = draw(
            jnp.asarray(logits),
            jnp.zeros((4, 3), bool),
            jnp.arange(4, dtype=jnp.uint32),
            jnp.arange(4),
            sampling,
        )
        assert tokens[:3].tolist() == [-1, -1, -1]
        assert int(tokens[3]) in (1, 2)


def test_rows_of_a_batch_are_the_rows_alone():
    """Bit for bit, whatever the others need."""
    samplings = [Sampling(temperature=0.0), Sampling(min_p=0.1), Sampling(top_k=3, top_p=0.7)]
    both = sampling_arrays(samplings, 3, vocab_size=VOCAB, seed=5)
    position = jnp.asarray([4, 9, 2])
    for row, sampling in enumerate(samplings):
        one = slice(row, row + 1)
        alone = arrays(LOGITS[one], sampling, 5 + row)
        np.testing.assert_array_equal(
            jit_filtered(LOGITS, SEEN, both)[row], jit_filtered(LOGITS[one], SEEN[one], alone)[0]
        )
        for step in range(20):
            together = jit_draw(LOGITS, SEEN, position + step, both)[row]
            assert together == jit_draw(LOGITS[one], SEEN[one], position[one] + step, alone)[0]


@pytest.mark.parametrize(
    ("samplings", "expected"),
    [
        ([Sampling(temperature=0.0, top_k=3)] * 2, GREEDY),
        ([Sampling(temperature=0.0), Sampling(min_p=0.1, vocab_limit=5, top_k=5)], PLAIN),
        ([Sampling(temperature=0.0), Sampling(top_p=0.9)], RANKED),
    ],
)
def test_the_vocabulary_is_in_order_only_where_a_row_needs_it(samplings, expected):
    made = sampling_arrays(samplings, 2, vocab_size=VOCAB)
    assert needed(made) == expected
    assert needed(made, jnp.asarray([True, False])) == GREEDY
    jaxpr = jax.make_jaxpr(draw_arrays)(LOGITS[:2], SEEN[:2], jnp.zeros((2,), jnp.int32), made)
    (switch,) = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    branches = [str(branch) for branch in switch.params["branches"]]
    assert ["sort[" in branch for branch in branches] == [False, False, True]
    assert ["random_bits" in branch for branch in branches] == [False, True, True]
    outside = [e for e in jaxpr.eqns if e is not switch]
    assert not any("sort" in str(e) for e in outside)


def test_a_bias_of_a_token_that_is_not_there():
    with pytest.raises(ValueError, match="logit_bias: expected token ids from 0 to 12, got 13"):
        sampling_arrays(Sampling(logit_bias={13: 1.0}), 1, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ([Sampling()] * 3, r"sampling: expected one or 2 of them \(rows\), got 3"),
        ([Sampling(), None], "sampling: expected a Sampling, one a row, or None, got"),
    ],
)
def test_samplings_that_are_not_one_a_row(sampling, message):
    with pytest.raises(ValueError, match=message):
        sampling_arrays(sampling, 2, vocab_size=VOCAB)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=5, top_p=0.9)])
def test_draws_have_the_distribution(sampling):
    count = 20_000
    tokens = draw(
        jnp.tile(LOGITS[0], (count, 1)),
        jnp.zeros((count, VOCAB), bool),
        jnp.arange(count, dtype=jnp.uint32),
        jnp.zeros((count,), jnp.int32),
        sampling,
    )
    expected = count * naive(LOGITS[0], np.zeros(VOCAB), sampling)
    counts = np.bincount(tokens, minlength=VOCAB)
    assert (counts[expected == 0] == 0).all()
    deviation = (counts - expected)[expected > 0] / np.sqrt(expected[expected > 0])
    assert np.abs(deviation).max() < 4.5, deviation
    # another position is another draw
    again = draw(
        jnp.tile(LOGITS[0], (count, 1)),
        jnp.zeros((count, VOCAB), bool),
        jnp.zeros((count,), jnp.uint32),
        jnp.arange(count),
        sampling,
    )
    deviation = (np.bincount(again, minlength=VOCAB) - expected)[expected > 0]
    assert np.abs(deviation / np.sqrt(expected[expected > 0])).max() < 4.5


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("temperature", -0.1, "a number >= 0"),
        ("temperature", float("inf"), "a number >= 0"),
        ("top_k", 0, "an int >= 1 or None"),
        ("top_p", 0.0, "a number above 0 and at most 1"),
        ("top_p", 1.5, "a number above 0 and at most 1"),
        ("repetition_penalty", 0.0, "a number > 0"),
        ("vocab_limit", 0, "an int >= 1 or None"),
        ("vocab_limit", 3.0, "an int >= 1 or None"),
        ("top_k", True, "an int >= 1 or None"),
        ("temperature", float("nan"), "a number >= 0"),
        ("temperature", None, "a number >= 0"),
        ("temperature", "hot", "a number >= 0"),
        ("top_p", "all", "a number above 0 and at most 1"),
        ("repetition_penalty", [1.0], "a number > 0"),
        ("min_p", -0.1, "a number from 0 to 1"),
        ("min_p", 1.1, "a number from 0 to 1"),
        ("logit_bias", [1], "token ids with numbers from -100 to 100, or None"),
        ("logit_bias", {3: 101}, "token ids with numbers from -100 to 100, or None"),
        ("logit_bias", {-1: 1.0}, "token ids with numbers from -100 to 100, or None"),
        ("logit_bias", {2: None}, "token ids with numbers from -100 to 100, or None"),
    ],
)
def test_bad_sampling(field, value, expected):
    with pytest.raises(ValueError, match=re.escape(f"{field}: expected {expected}, got {value!r}")):
        Sampling(**{field: value})


def test_numbers_of_numpy():
    same = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), top_p=np.float64(0.5))
    assert same == Sampling(temperature=0.5, top_k=3, top_p=0.5)
