"""Tables and figures from records alone."""

import json

import pytest

from benchmarks.language import report

RECIPE = {"steps": 4}


def record(model="mdn", shown="MDN", rate=1e-3, seed=0, bits=2.0, **changes):
    values = {
        "experiment": "language",
        "recipe": RECIPE,
        "model": model,
        "shown": shown,
        "learning_rate": rate,
        "seed": seed,
        "bits": bits,
        "curve": [[10, 3.0], [20, bits]],
        "skipped": 0,
        "diverged": None,
        "stability": None,
        "domains": {"c": 1.0, "prose": 2.0},
        "positions": [[0, 128, 3.0], [128, 256, 2.5]],
        "position_documents": 2,
        "needle": {"2048": [0.5, 1.0]},
        "parameters": 1234,
        "without_embeddings": 1000,
        "state": 5,
        "minutes": 1.2,
        "device": "cpu",
        "commit": "c" * 40,
        "jax": "0",
    }
    return values | changes


def rows(table):
    return [
        [x.strip() for x in line.split("|")[1:-1]] for line in table.splitlines() if "|" in line
    ]


def test_tables():
    gdn = {"model": "gdn", "shown": "GDN"}
    stability = {"skipped_from": 12, "curve": [[10, 2.0, 1.5], [20, None, None]]}
    lost = {"model": "no-mu-clamp", "shown": "MDN, no mu clamp", "state": None, "skipped": 50}
    records = [
        record(rate=1e-2, bits=1.9),  # better, but of one seed
        record(),
        record(seed=1, bits=2.2, domains={"c": 1.2, "prose": 2.4}),
        record(**gdn, domains={"c": 1.1, "prose": 2.2}),
        record(**gdn, seed=1, domains={"c": 1.2, "prose": 2.6}),
        record(**lost, bits=None, diverged=99, domains={}, positions=[], needle={}, curve=[])
        | {"stability": stability},
    ]
    models = report.results(records)
    assert [model.name for model in models] == ["gdn", "mdn", "no-mu-clamp"]
    text = report.tables(models)
    table = rows(text)
    assert table[2][0] == "GDN"
    assert table[2][-3:] == ["1.7750 ± 0.1768", "+0.1250 ± 0.0250", "0"]
    assert table[3] == [
        "MDN",
        "1,234 (1,000)",
        "5",
        "0.001 of 2",
        "2",
        "2.1000 ± 0.1414",
        "1.6500 ± 0.2121",
        "",
        "0",
    ]
    assert table[4][2:] == ["grows", "0.001 of 1", "1", "diverged at step 99", "-", "", "50"]
    assert ["MDN", "1.1000 ± 0.1414", "2.2000 ± 0.2828"] in table
    assert ["", "128", "256"] in table
    assert ["GDN", "50.0 ± 0.0"] in table
    assert "- MDN, no mu clamp, seed 0: steps skipped from 12 on" in text


def test_a_report_from_files(tmp_path, capsys):
    from benchmarks.language.command import LanguageConfig, language

    path = tmp_path / "results.jsonl"
    other = {"experiment": "mqar"}
    lines = [record(), record(seed=1), record(model="gdn_hybrid", shown="GDN, 3:1"), other]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    language(LanguageConfig(report=(path,), output=tmp_path / "out"))
    assert "3 runs, 4 device minutes; cpu, commit cccccccccccc." in capsys.readouterr().out
    for name in ("curves.png", "test.png", "stability.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    path.write_text(json.dumps(record(recipe={"steps": 5})) + "\n" + json.dumps(record()) + "\n")
    with pytest.raises(SystemExit, match="one recipe, got steps = 5 and 4"):
        report.read([path])
    path.write_text("")
    with pytest.raises(SystemExit, match="expected records of language, got none"):
        report.read([path])
    with pytest.raises(SystemExit, match="which is not there"):
        report.read([tmp_path / "none"])
