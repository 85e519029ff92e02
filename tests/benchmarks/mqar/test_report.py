"""Table and figure from records alone."""

import json

import pytest

from benchmarks.mqar.command import MqarConfig, mqar
from benchmarks.mqar.report import models, table, write
from benchmarks.run_reports import read_experiment


def record(variant="gdn", width=64, seed=0, rate=1e-3, choice=0.5, trained=0.5, **others):
    return {
        "experiment": "mqar",
        "variant": variant,
        "width": width,
        "value_width": 2.0,
        "vocabulary": 8192,
        "recipe": {"epochs": 32, "stop_at": 0.99},
        "seed": seed,
        "learning_rate": rate,
        "trained": {"4/64": trained, "64/256": trained - 0.2},
        "extrapolated": {"128/512": 0.1},
        "choice": {"4/64": choice, "64/256": choice, "128/512": choice},
        "parameters": 1234,
        "state_trained": width * width,
        "state_extrapolated": width * width,
        "commit": 40 * "a" + "-dirty",
        "device": "H200",
        "minutes": 12.0,
        "side_by_side": 4,
    } | others


RECORDS = [
    record(seed=0, rate=1e-3, choice=0.6, trained=0.9),
    record(seed=1, rate=1e-3, choice=0.6, trained=0.8),
    record(seed=0, rate=1e-2, choice=0.7, trained=0.6),
    record(seed=1, rate=1e-2, choice=0.4, trained=1.0),
    record(seed=0, rate=3e-2, choice=0.9, trained=0.3),  # its other seed is not there yet
    record("mdn_slow", 128),
    record("attention", state_extrapolated=9999),
]


def test_the_rate_is_chosen_on_rows_of_its_own():
    chosen = models(RECORDS)
    assert [(m.variant, m.width) for m in chosen] == [
        ("attention", 64),
        ("gdn", 64),
        ("mdn_slow", 128),
    ]
    gdn = chosen[1]
    assert (gdn.learning_rate, gdn.rates) == (1e-3, 3)
    assert gdn.trained == {"4/64": [0.9, 0.8], "64/256": pytest.approx([0.7, 0.6])}
    assert gdn.extrapolated == {"128/512": [0.1, 0.1]}


def test_a_run_made_twice_counts_once():
    again = [*RECORDS, record(seed=1, rate=1e-3, choice=0.6, trained=0.7)]
    assert models(again)[1].trained["4/64"] == [0.9, 0.7]


def test_table():
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]]
        for row in table(models(RECORDS)).splitlines()
    ]
    assert rows[0][-3:] == ["4/64", "64/256", "128/512 (extrapolated)"]
    gdn = ["GDN", "64 (2)", "1,234", "4,096", "0.001 of 3", "2"]
    assert rows[3] == [*gdn, "85.0 ± 7.1", "65.0 ± 7.1", "10.0 ± 0.0"]
    assert rows[4][0] == "MDN, slow to forget"
    assert rows[4][-1] == "10.0"  # one seed has no spread


def test_files_are_joined(tmp_path, capsys):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, own in zip(paths, (RECORDS[:3], RECORDS[3:]), strict=True):
        path.write_text("".join(json.dumps(r) + "\n" for r in own))
    output = tmp_path / "report"
    mqar(MqarConfig(report=tuple(paths), output=output))
    text = (output / "table.md").read_text()
    assert "7 runs, 21 device minutes; H200, commit aaaaaaaaaaaa-dirty." in text
    assert text in capsys.readouterr().out
    assert (output / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert not (output / "results.jsonl").exists()
    assert write(RECORDS, output) + "\n" == text


def test_files_that_do_not_fit(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(SystemExit, match=r"report: expected files of records, got .*not there"):
        read_experiment([path], "mqar")
    path.write_text("# a table")
    with pytest.raises(SystemExit, match="expected lines of JSON, got '# a table'"):
        read_experiment([path], "mqar")
    path.write_text('{"experiment": "other"}\n')
    with pytest.raises(SystemExit, match="report: expected records of mqar, got none in 1 files"):
        read_experiment([path], "mqar")
    others = [record(), record(recipe={"epochs": 8, "stop_at": 0.99})]
    path.write_text("".join(json.dumps(r) + "\n" for r in others))
    with pytest.raises(SystemExit, match="one recipe, got epochs = 32 and 8"):
        read_experiment([path], "mqar")
