"""Rows of associative recall: what stands where, and how often."""

import numpy as np
import pytest

from benchmarks.mqar.data import (
    EXTRAPOLATED,
    MEASURED,
    TRAINED,
    VOCABULARY,
    Setting,
    draw_rows,
    place_weights,
)

SETTING = Setting(8, 64, 300)


@pytest.mark.parametrize("setting", [SETTING, Setting(64, 256, 50), Setting(256, 1024, 5)])
def test_every_pair_is_asked_for_once(setting):
    tokens, places, answers = draw_rows(setting, (0,))
    pairs, length, rows = setting
    assert tokens.shape == (rows, length)
    assert places.shape == answers.shape == (rows, pairs)
    keys, values = tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2]
    assert 1 <= keys.min() <= keys.max() <= 4095 < 4096 <= values.min() <= values.max() <= 8191
    for own in (keys, values, places):
        assert (np.diff(np.sort(own, axis=1), axis=1) > 0).all()  # each once
    assert (places % 2 == 0).all()
    assert places.min() >= 2 * pairs
    assert places.max() < length
    np.testing.assert_array_equal(np.take_along_axis(tokens, places, axis=1), keys)
    np.testing.assert_array_equal(answers, values)


def test_places_follow_the_law():
    rows = 40_000
    first = draw_rows(Setting(1, 34, rows), (1,)).places[:, 0] // 2 - 1
    expected = place_weights(16)
    assert expected[0] / expected[3] == pytest.approx(4**0.99)
    got = np.bincount(first, minlength=16) / rows
    error = np.sqrt(expected * (1 - expected) / rows)
    assert (np.abs(got - expected) < 4 * error).all()


def test_the_second_place_is_drawn_from_those_that_are_left():
    rows = 40_000
    places = draw_rows(Setting(2, 12, rows), (2,)).places // 2 - 2  # of 4 places
    p = place_weights(4)
    for i, j in ((0, 1), (1, 0), (3, 0)):
        expected = p[i] * p[j] / (1 - p[i])
        got = np.mean((places[:, 0] == i) & (places[:, 1] == j))
        assert abs(got - expected) < 4 * np.sqrt(expected * (1 - expected) / rows)


def test_keys_and_noise_are_uniform():
    tokens, places, _ = draw_rows(Setting(2, 32, 20_000), (3,), vocabulary=16)
    for column in (0, 2):
        counts = np.bincount(tokens[:, column], minlength=8)[1:8]
        assert (np.abs(counts / 20_000 - 1 / 7) < 0.012).all()
    np.put_along_axis(tokens, places, -1, axis=1)
    noise = tokens[:, 4:][tokens[:, 4:] >= 0]
    shares = np.bincount(noise, minlength=16) / len(noise)
    assert (np.abs(shares - 1 / 16) < 0.002).all()  # of the whole vocabulary


def test_rows_follow_the_seed():
    one, again, other = (draw_rows(SETTING, seed) for seed in ((5, 0), (5, 0), (5, 1)))
    np.testing.assert_array_equal(one.tokens, again.tokens)
    assert (one.tokens != other.tokens).any(axis=1).all()


def test_settings_of_zoology():
    assert sum(setting.rows for setting in TRAINED) == 180_000
    longest = max(setting.length for setting in TRAINED)
    assert all(setting.length <= longest for setting in MEASURED)
    assert all(setting.length > longest for setting in EXTRAPOLATED)
    assert VOCABULARY == 8192


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (Setting(0, 64, 1), "pairs: expected an int from 1 to 4095, got 0"),
        (Setting(8, 31, 1), "length: expected an even int >= 4 [*] pairs = 32, got 31"),
        (Setting(8, 33, 1), "length: expected an even int >= 4 [*] pairs = 32, got 33"),
    ],
)
def test_settings_that_do_not_fit(setting, message):
    with pytest.raises(ValueError, match=message):
        draw_rows(setting, (0,))
