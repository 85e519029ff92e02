"""`python -m benchmarks language`: models, a small run that goes on, the table."""

import dataclasses
import json

import pytest

from benchmarks.equal_models import model_size
from benchmarks.language import _SMOKE, LanguageConfig, Outcome, _models, language, table
from train.guard import DivergedError


def test_models_of_equal_parameters_and_ablations():
    ablations = (
        "no-momentum",
        "no-output-correction",
        "no-beta-bound",
        "no-alpha-bound",
        "no-mu-clamp",
    )
    models = _models(LanguageConfig(ablations=ablations, hidden_size=128, layers=2))
    assert len(models) == 14
    counts = [model_size(model).parameters for model in models.values()]
    assert max(counts) / min(counts) < 1.01
    full = models["MDN"]
    for name, field, value in (
        ("MDN, no momentum", "use_momentum", False),
        ("MDN, no output correction", "use_output_correction", False),
        ("MDN, no beta bound", "bound", "alpha"),
        ("MDN, no alpha bound", "bound", "beta"),
        ("MDN, no mu clamp", "min_log_mu", None),
    ):
        changed = {n: x for n, x in vars(models[name]).items() if x != getattr(full, n)}
        assert changed == {field: value}


@pytest.mark.slow
def test_smoke(tmp_path, capsys, monkeypatch):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(f"document {i} of the corpus. " * 5)
    options = {"files": (str(text / "*.txt"),), "mixers": ("gdn",), "output": tmp_path / "out"}
    language(LanguageConfig(**options, smoke=True))
    (line,) = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["model"], record["seed"], record["skipped"]) == ("GDN", 0, 0)
    assert [seen for seen, _ in record["curve"]] == [64, 128]
    assert record["bits"] == pytest.approx(record["curve"][-1][1]) == pytest.approx(8, abs=0.5)
    written = (tmp_path / "out" / "table.md").read_text()
    assert written in capsys.readouterr().out
    assert (tmp_path / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "out" / "results.jsonl").unlink()
    language(LanguageConfig(**options, smoke=True))  # goes on after the last checkpoint
    (line,) = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["bits"] == pytest.approx(record["bits"], abs=1e-5)

    def not_again(*_):
        raise AssertionError

    monkeypatch.setattr("benchmarks.language._run", not_again)
    language(LanguageConfig(**options, smoke=True))
    assert (tmp_path / "out" / "table.md").read_text() == written
    with pytest.raises(AssertionError):
        language(LanguageConfig(**options, smoke=True, learning_rate=1e-4))


def test_a_run_that_diverges_is_a_result(tmp_path, monkeypatch, capsys):
    def diverges(config):
        raise DivergedError("guard: ...", step=7)

    monkeypatch.setattr("train.loop.train", diverges)
    config = LanguageConfig(mixers=("mdn",), seeds=(0, 1), output=tmp_path, smoke=True)
    language(dataclasses.replace(config, ablations=("no-alpha-bound",)))
    records = [json.loads(x) for x in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["model"], r["bits"], r["diverged"], r["curve"]) for r in records] == [
        ("MDN", None, 7, []),
        ("MDN, no alpha bound", None, 7, []),
    ]
    assert "MDN, no alpha bound, seed 0: diverged at step 7" in capsys.readouterr().out


def outcome(model, seed, bits, skipped=0, state=5, diverged=None):
    return Outcome(model, seed, 1234, state, bits, skipped, diverged, [(10, bits)], 1.0)


def test_table():
    outcomes = [
        outcome("MDN", 0, 2.0),
        outcome("MDN", 1, 2.2),
        outcome("MDN, no mu clamp", 0, None, 3, diverged=1234),
        outcome("MDN, no mu clamp", 1, 2.5, 1),
        outcome("Transformer", 0, None, state=None),
    ]
    rows = table(outcomes).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells == [
        ["MDN", "1,234", "5", "2.1000 ± 0.1414", "0"],
        ["MDN, no mu clamp", "1,234", "5", "2.5000 ± 0.0000; diverged at step 1,234", "4"],
        ["Transformer", "1,234", "grows", "not finite", "0"],
    ]


def test_bad_configurations():
    assert set(_SMOKE) <= set(vars(LanguageConfig()))
    with pytest.raises(ValueError, match="mixers: expected at least one model"):
        LanguageConfig(mixers=())
    with pytest.raises(ValueError, match="seeds: expected at least one"):
        LanguageConfig(seeds=())
