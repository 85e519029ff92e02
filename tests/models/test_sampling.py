"""Samplers against numpy, and their statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdn_jax import Sampling
from mdn_jax.models.sampling import draw, filtered_logits

VOCAB = 13
RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(3 * RNG.normal(size=(3, VOCAB)), jnp.float32)
SEEN = jnp.asarray(RNG.random((3, VOCAB)) < 0.4)


def naive(logits, seen, sampling):
    """Probabilities of one row, with loops."""
    x = [float(value) for value in logits]
    limit = sampling.vocab_limit or len(x)
    for i in range(len(x)):
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
    ],
)
def test_bad_sampling(field, value, expected):
    with pytest.raises(ValueError, match=f"{field}: expected {expected}, got {value}"):
        Sampling(**{field: value})
