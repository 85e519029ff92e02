"""Every task's answers can be found in its rows, and nowhere else."""

import itertools
import re

import jax
import numpy as np
import pytest

from benchmarks.tasks.retrieval import NEEDLE_BYTES, Copying, Induction, Needle, Recall
from benchmarks.tasks.task import IGNORED
from benchmarks.tasks.tracking import Tracking, products

TASKS = {
    "recall": Recall(pairs=(5, 3), gap=4, keys=9, noise=3),
    "copying": Copying(count=4, noise_length=11, kinds=3),
    "induction": Induction(length=12, kinds=4),
    "needle": Needle(length=120, digits=3),
    "parity": Tracking(group="z2", length=10),
    "modulo 3": Tracking(group="z3", length=10),
    "modulo 5": Tracking(group="z5", length=17),
    "s5": Tracking(group="s5", length=6),
}


def rows(name, seed=0, level=None):
    task = TASKS[name]
    level = task.levels[0] if level is None else level
    tokens, targets = (np.asarray(x) for x in task.sample(jax.random.key(seed), 8, level))
    return list(zip(tokens.tolist(), targets.tolist(), strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_shapes_ranges_and_seeds(name):
    task = TASKS[name]
    for tokens, targets in rows(name):
        assert len(tokens) == len(targets) == task.length
        assert 0 <= min(tokens) <= max(tokens) < task.vocab_size
        counted = [target for target in targets if target != IGNORED]
        assert counted
        assert all(0 <= target < task.vocab_size for target in counted)
    assert rows(name) == rows(name)
    assert rows(name) != rows(name, seed=1)
    assert len({tuple(tokens) for tokens, _ in rows(name)}) == 8


def test_recall():
    for tokens, targets in rows("recall"):
        pairs = dict(zip(tokens[0:10:2], tokens[1:10:2], strict=True))
        assert len(pairs) == 5
        assert max(pairs) < 9 <= min(pairs.values()) <= max(pairs.values()) < 18
        assert min(tokens[10:14]) >= 18
        assert sorted(tokens[14:]) == sorted(pairs)
        assert targets == [IGNORED] * 14 + [pairs[key] for key in tokens[14:]]
    orders = {tuple(np.argsort(tokens[14:])) for tokens, _ in rows("recall")}
    assert len(orders) > 4


def test_recall_of_fewer_pairs():
    for tokens, targets in rows("recall", level=3):
        assert min(tokens[:4] + tokens[10:14] + tokens[17:]) >= 18
        pairs = dict(zip(tokens[4:10:2], tokens[5:10:2], strict=True))
        assert len(pairs) == 3
        assert max(pairs) < 9 <= min(pairs.values()) <= max(pairs.values()) < 18
        assert sorted(tokens[14:17]) == sorted(pairs)
        answers = [pairs[key] for key in tokens[14:17]]
        assert targets == [IGNORED] * 14 + answers + [IGNORED] * 2


def test_copying():
    for tokens, targets in rows("copying"):
        values = [token for token in tokens[:11] if token != 3]
        assert len(values) == 4
        assert tokens[11:] == [4] * 4
        assert targets == [IGNORED] * 11 + values
    places = {tuple(t == 3 for t in tokens[:11]) for tokens, _ in rows("copying")}
    assert len(places) > 4


def test_induction():
    for tokens, targets in rows("induction"):
        assert tokens[-1] == 4
        assert tokens.count(4) == 2
        assert targets == [IGNORED] * 11 + [tokens[tokens.index(4) + 1]]


def test_needle():
    depths = set()
    for tokens, targets in rows("needle"):
        text = bytes(tokens).decode()
        (match,) = re.finditer(r" The pass key is (\d{3})\. ", text)
        depths.add(match.start())
        assert text.endswith(f" What is the pass key? The pass key is {match[1][:-1]}")
        assert targets == [IGNORED] * 117 + list(match[1].encode())
        rest = text[: match.start()] + text[match.end() : text.index(" What")]
        assert "pass" not in rest
    assert len(depths) > 4
    exact = Needle(length=NEEDLE_BYTES.least(5))
    assert exact.sample(jax.random.key(0), 3, exact.length).tokens.shape == (3, exact.length)


@pytest.mark.parametrize(("name", "modulus"), [("parity", 2), ("modulo 3", 3), ("modulo 5", 5)])
def test_counting(name, modulus):
    for tokens, targets in rows(name):
        assert set(tokens) == {0, 1}
        assert targets == [sum(tokens[: i + 1]) % modulus for i in range(len(tokens))]


def test_s5():
    elements = list(itertools.permutations(range(5)))
    for tokens, targets in rows("s5"):
        now = (0, 1, 2, 3, 4)
        for token, target in zip(tokens, targets, strict=True):
            now = tuple(elements[token][i] for i in now)
            assert elements[target] == now
    table = products("s5")
    assert (table != table.T).any()  # it does not commute
    assert all(sorted(row) == list(range(120)) for row in table.tolist())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: Recall(pairs=(3, 10), keys=9),
            "pairs: expected an int .* keys = 9, got 10",
        ),
        (lambda: Recall(gap=-1), "gap: expected an int at least 0, got -1"),
        (lambda: Copying(count=9, noise_length=8), "count: expected an int from 1 to .* = 8"),
        (lambda: Induction(length=2), "length: expected an int at least 3, got 2"),
        (lambda: Needle(length=50), r"length: expected an int at least \d+, got 50"),
        (lambda: Tracking(length=0), "length: expected an int at least 1, got 0"),
    ],
)
def test_bad_knobs(make, words):
    with pytest.raises(ValueError, match=words):
        make()
