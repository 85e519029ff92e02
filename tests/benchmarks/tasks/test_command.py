"""Equal models, seeds side by side, the choice of a learning rate, files."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks.equal_models import SHOWN, Size, model_config, model_size
from benchmarks.tasks.command import TasksConfig, settings, tasks
from benchmarks.tasks.report import Result, table
from benchmarks.tasks.tracking import Tracking
from benchmarks.tasks.train import Recipe, Score, Steps, train_task

RECIPE = Recipe(
    steps=90,
    batch_size=16,
    weight_decay=0.0,
    points=3,
    test_rows=64,
    implementation="scan",
    dtype="float32",
)
SHAPE = {"vocab_size": 50, "hidden_size": 64, "layers": 2, "heads": 2}


@pytest.mark.parametrize("equal", ["state", "parameters"])
def test_models_are_equal(equal):
    sizes = {mixer: model_size(model_config(mixer, **SHAPE, equal=equal)) for mixer in SHOWN}
    counts = [size.parameters for size in sizes.values()]
    assert max(counts) / min(counts) < 1.01
    states = {mixer: size.state for mixer, size in sizes.items()}
    assert states.pop("attention") is None
    last = 2 * 8 * (32 + 16)  # layers, heads, key and value
    states["mamba3"] -= last
    assert (len(set(states.values())) == 1) == (equal == "state")
    assert states["gdn"] == 2 * 64 * 32 * 2  # layers, hidden, head width, twice as wide values


@pytest.mark.parametrize(("hidden", "heads", "expected"), [(64, 4, 1), (256, 4, 4), (96, 6, 3)])
def test_heads_of_attention_are_not_narrow(hidden, heads, expected):
    shape = SHAPE | {"hidden_size": hidden, "heads": heads}
    config = model_config("attention", **shape, equal="state")
    assert (config.num_heads, config.head_dim) == (expected, hidden // expected)
    assert model_config("gdn", **shape, equal="state").num_heads == heads


def test_a_width_that_heads_do_not_divide():
    with pytest.raises(ValueError, match="heads: expected a divisor of half of hidden_size = 64"):
        model_config("mdn", **SHAPE | {"heads": 3}, equal="state")


@pytest.mark.slow
def test_parity_is_learned_and_seeds_are_independent():
    task = Tracking(group="z2", length=2)
    model = model_config("gdn", vocab_size=2, hidden_size=16, layers=1, heads=2, equal="parameters")
    options = {"learning_rates": (1e-2, 1e-9)}
    scores = train_task(task, model, RECIPE, seeds=(0, 1), **options)
    assert [(s.seed, s.learning_rate) for s in scores] == [
        (seed, rate) for seed in (0, 1) for rate in (1e-2, 1e-9)
    ]
    for learned, not_learned in (scores[:2], scores[2:]):
        assert learned.accuracy > 0.95 > 0.9 > not_learned.accuracy
        assert [step for step, _, _ in learned.curve] == [30, 60, 90]
        assert learned.curve[-1][1] < 0.5 * learned.curve[0][1]
    assert scores[0].loss != scores[2].loss


def result(mixer, level, scores, state=10):
    return Result("recall", level, mixer, Size(100, state), scores)


def test_the_learning_rate_is_chosen_on_other_rows():
    scores = [
        Score(4, 0, 0.1, choice=0.9, accuracy=0.5, loss=1.0, curve=[]),
        Score(4, 1, 0.1, choice=0.7, accuracy=0.7, loss=1.0, curve=[]),
        Score(4, 0, 0.2, choice=0.6, accuracy=0.9, loss=1.0, curve=[]),
        Score(4, 1, 0.2, choice=0.8, accuracy=0.9, loss=1.0, curve=[]),
    ]
    chosen = result("mdn", 4, scores)
    assert chosen.accuracies == [0.5, 0.7]
    longer = [score._replace(level=8, choice=1 - score.choice / 10) for score in scores]
    assert result("mdn", 8, scores + longer).accuracies == [0.5, 0.7]  # one rate for both
    assert result("mdn", 8, longer).accuracies == [0.9, 0.9]
    other = [score._replace(level=8) for score in scores[2:]]
    rows = table([chosen, result("attention", 8, other, None)]).splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells[0] == ["", "parameters", "state", "recall 4", "recall 8"]
    assert cells[2] == ["MDN", "100", "10", "60.0 ± 14.1", "-"]
    assert cells[3] == ["Transformer", "100", "grows", "-", "90.0 ± 0.0"]


@pytest.mark.slow
def test_smoke(tmp_path, capsys, monkeypatch):
    config = TasksConfig(
        tasks=("s5", "recall"), mixers=("gdn", "attention"), smoke=True, output=tmp_path
    )
    tasks(config)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    ran = [(r["task"], r["level"], r["mixer"], r["seed"]) for r in records]
    runs = [("s5", 8, "gdn"), ("s5", 8, "attention"), ("recall", 2, "gdn"), ("recall", 4, "gdn")]
    assert ran == [(*run, seed) for run in runs for seed in (0, 1)]
    assert records[0]["setting"] == {"group": "s5", "length": 8}
    assert all(0 <= r["accuracy"] <= 1 and len(r["curve"]) == 2 for r in records)
    assert "Transformer" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"

    def not_again(*_, **__):
        raise AssertionError

    monkeypatch.setattr("benchmarks.tasks.command.train_task", not_again)
    before = (tmp_path / "table.md").read_text()
    tasks(config)
    assert (tmp_path / "table.md").read_text() == before
    assert (tmp_path / "results.jsonl").read_text().splitlines() == lines
    with pytest.raises(AssertionError):
        tasks(dataclasses.replace(config, equal="parameters"))


def test_the_largest_factor_is_that_of_the_gates():
    model = model_config("mdn", equal="state", **SHAPE)
    published, small = (
        Steps(Tracking(), model, RECIPE._replace(largest_factor=largest)).start(0, 1.0).params
        for largest in (4.0, 0.4)
    )
    for x, y in zip(jax.tree.leaves(published), jax.tree.leaves(small), strict=True):
        assert x.shape == y.shape
    factors = [np.exp(p["layers"][0]["mixer"]["gates"]["log_factor"]) for p in (published, small)]
    assert 0.4 < factors[0].max() <= 4
    np.testing.assert_allclose(factors[1], factors[0] / 10, rtol=1e-5)
    gates = (p["layers"][1]["mixer"]["gates"]["mu_log"] for p in (published, small))
    np.testing.assert_array_equal(*gates)


def test_settings_and_bad_ones():
    config = TasksConfig(tasks=("recall", "s5"), recall_pairs=(4, 8), recall_gap=3)
    chosen = [(name, task.levels, task.length) for name, task in settings(config)]
    lengths = [("s5", (length,), length) for length in config.s5_lengths]
    assert chosen == [("recall", (4, 8), 27), *lengths]
    with pytest.raises(ValueError, match="mixers: expected at least one"):
        TasksConfig(mixers=())
    with pytest.raises(ValueError, match="largest_factor: expected a number > 0, got 0"):
        TasksConfig(largest_factor=0)
    with pytest.raises(ValueError, match="steps: expected an int >= 1, got 0"):
        TasksConfig(steps=0)
    with pytest.raises(SystemExit, match="length: expected an int at least"):
        tasks(TasksConfig(tasks=("needle",), needle_lengths=(10,)))
