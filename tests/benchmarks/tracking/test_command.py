"""The command: which models, bad options, records, going on; table and figure from records."""

import dataclasses
import json
from typing import get_args

import pytest

from benchmarks.equal_models import model_size
from benchmarks.tracking import command
from benchmarks.tracking.command import TrackingConfig, tracking
from benchmarks.tracking.report import models, table
from benchmarks.tracking.variants import Variant, largest_factor, variant_config


def test_states_are_equal_and_parameters_nearly():
    configs = {
        variant: variant_config(variant, vocab_size=5, hidden_size=64, layers=2, heads=4)
        for variant in get_args(Variant)
    }
    sizes = [model_size(config) for config in configs.values()]
    assert len({size.state for size in sizes}) == 1
    parameters = [size.parameters for size in sizes]
    assert max(parameters) < 1.01 * min(parameters)
    assert [config.bound for config in configs.values()] == [
        *("published", "published", "stable", "none"),
        *("published", "published"),
    ]
    assert [v for v, config in configs.items() if config.allow_neg_eigval] == ["gdn_negative"]
    free = [v for v, config in configs.items() if config.min_log_mu is None]
    assert free == ["mdn_stable", "mdn_unbounded"]
    assert [v for v in configs if largest_factor(v) < 4] == ["mdn_slow"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ()}, "tasks: expected at least one, got none"),
        ({"steps": 0}, "steps: expected an int >= 1, got 0"),
        ({"tested": (8, 8)}, r"tested: expected ascending ints >= 1, got \(8, 8\)"),
        ({"minutes": 0.0}, "minutes: expected a number > 0 or None, got 0.0"),
        ({"heads": 3}, "heads: expected a divisor of half of hidden_size = 64, got 3"),
    ],
)
def test_options_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        TrackingConfig(**fields)


def record(variant="gdn", task="parity", seed=0, rate=1e-3, choice=0.5, test=0.5):
    return {
        "experiment": "tracking",
        "task": task,
        "variant": variant,
        "recipe": {"trained": 128},
        "seed": seed,
        "learning_rate": rate,
        "choice": {"128": choice, "2048": choice},
        "test": {"128": test, "2048": test / 2},
        "parameters": 1234,
        "state": 4096,
        "chance": 0.5,
        "commit": 40 * "a",
        "device": "H200",
        "minutes": 12.0,
        "side_by_side": 4,
    }


RECORDS = [
    record(seed=0, rate=1e-3, choice=0.6, test=0.9),
    record(seed=1, rate=1e-3, choice=0.6, test=0.8),
    record(seed=0, rate=1e-2, choice=0.7, test=0.6),
    record(seed=1, rate=1e-2, choice=0.4, test=1.0),
    record("mdn_stable", "s5"),
    record("mdn"),
]


def test_table():
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]]
        for row in table(models(RECORDS)).splitlines()
    ]
    assert rows[0][:3] == ["task", "", "parameters"]
    assert rows[0][-3:] == ["chance", "1-128", "129-2048"]
    assert [row[:2] for row in rows[2:]] == [
        ["parity", "MDN"],
        ["parity", "GDN"],
        ["S5", "MDN, stable region"],
    ]
    rest = ["1,234", "4,096", "0.001 of 2", "2", "50.0", "85.0 ± 7.1", "42.5 ± 3.5"]
    assert rows[3][2:] == rest


def test_files_are_joined(tmp_path, capsys):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, own in zip(paths, (RECORDS[:3], RECORDS[3:]), strict=True):
        path.write_text("".join(json.dumps(r) + "\n" for r in own))
    output = tmp_path / "report"
    tracking(TrackingConfig(report=tuple(paths), output=output))
    text = (output / "table.md").read_text()
    assert "6 runs, 18 device minutes; H200, commit aaaaaaaaaaaa." in text
    assert text in capsys.readouterr().out
    assert (output / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit, match=r"report: expected files of records, .* not there"):
        tracking(TrackingConfig(report=(tmp_path / "none",)))


@pytest.mark.slow
def test_smoke(tmp_path, capsys, monkeypatch):
    options = {"tasks": ("mod3",), "mixers": ("mdn_stable",), "smoke": True, "output": tmp_path}
    config = TrackingConfig(**options, minutes=1e-6)
    tracking(config)
    assert "minutes are over; the same command goes on" in capsys.readouterr().out
    assert (tmp_path / "results.jsonl").read_text() == ""
    config = dataclasses.replace(config, minutes=None, commit="abc")
    tracking(config)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["seed"], r["learning_rate"]) for r in records] == [(0, 1e-3), (0, 1e-2)]
    for one in records:
        assert (one["task"], one["variant"], one["commit"]) == ("mod3", "mdn_stable", "abc")
        assert list(one["test"]) == list(one["choice"]) == ["8", "16"]
        assert (one["end"], len(one["curve"]), one["side_by_side"]) == ("steps", 2, 2)
        assert one["minutes"] > 0
        assert one["chance"] == pytest.approx(1 / 3)
        assert one["model"]["bound"] == "stable"
    assert not list((tmp_path / "unfinished").glob("*"))
    assert (tmp_path / "accuracy.png").exists()

    def not_again(*_, **__):
        raise AssertionError

    monkeypatch.setattr(command, "train_group", not_again)
    before = (tmp_path / "table.md").read_text()
    tracking(config)
    assert (tmp_path / "table.md").read_text() == before
    with pytest.raises(AssertionError):
        tracking(dataclasses.replace(config, tasks=("parity",)))
