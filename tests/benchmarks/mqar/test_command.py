"""The command: which models, records, the time it has, going on."""

import dataclasses
import json

import jax
import pytest

from benchmarks.mqar import command
from benchmarks.mqar.command import MqarConfig, mqar, recipe_of, shapes_of
from benchmarks.runs import Clock


def test_models_that_are_in_both_comparisons_run_once():
    shapes = shapes_of(MqarConfig(mixers=("attention", "gdn", "kda", "mdn"), widths=(128, 64)))
    assert [(s.width, s.variant, s.value_width) for s in shapes] == [
        (width, variant, values)
        for width in (64, 128)
        for variant, values in (
            ("attention", 1.0),
            ("gdn", 2.0),
            ("kda", 1.0),
            ("kda", 2.0),
            ("mdn", 2.0),
            ("mdn", 1.0),
        )
    ]


def test_the_recipe_is_that_of_zoology():
    recipe = recipe_of(MqarConfig())
    assert (recipe.epochs, recipe.batch_size, recipe.stop_at) == (32, 256, 0.99)
    assert MqarConfig().learning_rates == (1e-3, 3.2e-3, 1e-2, 3.2e-2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": ()}, "widths: expected at least one, got none"),
        ({"epochs": 0}, "epochs: expected an int >= 1, got 0"),
        ({"minutes": 0.0}, "minutes: expected a number > 0 or None, got 0.0"),
        ({"widths": (20,)}, "width: expected a multiple of 8, got 20"),
        ({"batch_size": 30_000}, "batch_size: expected at most 20000, got 30000"),
    ],
)
def test_options_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        MqarConfig(**fields)


def test_a_directory_that_git_does_not_know(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(SystemExit, match="commit: expected --commit or a directory that git knows"):
        mqar(MqarConfig(output=tmp_path / "out"))


def test_the_clock():
    assert Clock(None).allows(1e9)
    assert Clock(1.0).allows(59)
    assert not Clock(1.0).allows(61)


def test_more_than_fits_into_the_memory(tmp_path, monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(command, "train_group", full)
    with pytest.raises(SystemExit, match=r"side_by_side: expected what fits .* got 5 runs at once"):
        mqar(MqarConfig(smoke=True, side_by_side=5, output=tmp_path))


@pytest.mark.slow
def test_smoke(tmp_path, capsys, monkeypatch):
    config = MqarConfig(mixers=("attention",), smoke=True, output=tmp_path, minutes=1e-6)
    mqar(config)
    assert "minutes are over; the same command goes on" in capsys.readouterr().out
    assert (tmp_path / "results.jsonl").read_text() == ""
    config = dataclasses.replace(config, minutes=None, commit="abc")
    mqar(config)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["seed"], r["learning_rate"]) for r in records] == [(0, 1e-3), (0, 1e-2)]
    for record in records:
        assert list(record["trained"]) == ["2/16"]
        assert list(record["extrapolated"]) == ["6/32"]
        assert list(record["choice"]) == ["2/16", "6/32"]
        assert record["commit"] == "abc"
        assert record["minutes"] > 0
        assert (record["epochs"], record["end"], len(record["curve"])) == (2, "epochs", 2)
        assert (record["state_trained"], record["state_extrapolated"]) == (1024, 1024)
    assert not list((tmp_path / "unfinished").glob("*"))
    assert (tmp_path / "accuracy.png").exists()

    def not_again(*_, **__):
        raise AssertionError

    monkeypatch.setattr(command, "train_group", not_again)
    before = (tmp_path / "table.md").read_text()
    mqar(config)
    assert (tmp_path / "table.md").read_text() == before
    with pytest.raises(AssertionError):
        mqar(dataclasses.replace(config, data_seed=1))
