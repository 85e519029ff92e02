"""`python -m benchmarks language`: the plan of its runs, a small run that goes on."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.language import command
from benchmarks.language.command import LanguageConfig, language
from benchmarks.language.measure import DIGITS, Sizes, Trained, measure
from benchmarks.language.smoke import SMOKE, tiny_corpus
from benchmarks.tasks.retrieval import needle_rows
from mdn_jax import MDNConfig
from mdn_jax.text.tokenizer import ByteTokenizer
from tests.tiny import TINY_MODEL, chain_model
from train.guard import DivergedError
from train.step import split_model


def records_of(directory):
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


def finished(bits):
    return {
        "bits": bits,
        "curve": [],
        "skipped": 0,
        "diverged": None,
        "stability": None,
        "domains": {},
        "positions": [],
        "position_documents": 0,
        "needle": {},
        "minutes": 0.1,
    }


def test_rates_with_one_seed_then_seeds_at_the_best(tmp_path, monkeypatch):
    made = []

    def run(model, seed, rate, *_, directory, stop):
        made.append((model.name, seed, rate))
        return finished(2 + abs(rate - (1e-2 if model.name == "mdn" else 1e-3)))

    monkeypatch.setattr(command, "train_and_measure", run)
    text = tmp_path / "a.txt"
    text.write_text("text " * 99)
    config = LanguageConfig(
        files=(str(text),),
        mixers=("mdn", "gdn"),
        ablations=("no-mu-clamp",),
        seeds=(3, 4),
        learning_rates=(1e-3, 1e-2),
        hidden_size=16,
        heads=1,
        layers=1,
        commit="c",
        output=tmp_path / "out",
    )
    language(config)
    assert made == [
        ("mdn", 3, 1e-3),
        ("mdn", 3, 1e-2),
        ("gdn", 3, 1e-3),
        ("gdn", 3, 1e-2),
        ("no-mu-clamp", 3, 1e-2),
        ("mdn", 4, 1e-2),
        ("gdn", 4, 1e-3),
        ("no-mu-clamp", 4, 1e-2),
    ]
    made.clear()
    language(config)  # all of it is there
    assert made == []
    language(dataclasses.replace(config, steps=5000))
    assert len(made) == 8


def test_the_time_is_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "train_and_measure", lambda *_, **__: None)
    language(LanguageConfig(mixers=("mdn",), minutes=9, output=tmp_path, commit="c", layers=1))
    assert "The 9 minutes are over; the same command goes on." in capsys.readouterr().out
    assert records_of(tmp_path) == []


@pytest.mark.slow
def test_smoke_is_cut_short_and_goes_on(tmp_path, capsys, monkeypatch):
    options = {"mixers": ("mdn",), "output": tmp_path, "smoke": True}
    asked = []

    class Clock:
        def __init__(self, minutes):
            pass

        def allows(self, seconds):  # the first run ends after its second step
            asked.append(seconds)
            return len(asked) != 3

    monkeypatch.setattr(command, "Clock", Clock)
    language(LanguageConfig(**options, minutes=1))
    out = capsys.readouterr().out
    assert "1,024 tokens a run (0.0" in out
    assert "minutes are over" in out
    assert (tmp_path / "mdn-0.001-0" / "minutes.json").exists()
    language(LanguageConfig(**options))
    out = capsys.readouterr().out
    assert "resumed after step 2 of 4" in out
    (record,) = records_of(tmp_path)
    assert (record["model"], record["seed"], record["skipped"]) == ("mdn", 0, 0)
    assert [seen for seen, _ in record["curve"]] == [512, 1024]
    assert record["bits"] == pytest.approx(record["curve"][-1][1]) == pytest.approx(8, abs=0.5)
    assert set(record["domains"]) == {"email", "wsgi"}
    assert all(bits == pytest.approx(8, abs=0.5) for bits in record["domains"].values())
    assert [row[:2] for row in record["positions"]] == [[0, 128]]
    assert list(record["needle"]) == ["128"]
    assert [row[0] for row in record["stability"]["curve"]] == [2, 4]
    assert not (tmp_path / "mdn-0.001-0" / "checkpoints").exists()
    assert (tmp_path / "table.md").read_text().strip() in out


def test_a_run_that_diverges_is_a_result(tmp_path, monkeypatch, capsys):
    def diverges(config, stop):
        raise DivergedError("guard: ...", step=7)

    monkeypatch.setattr("train.loop.train", diverges)
    language(
        LanguageConfig(mixers=("mdn",), ablations=("no-alpha-bound",), output=tmp_path, smoke=True)
    )
    found = [(r["model"], r["bits"], r["diverged"], r["curve"]) for r in records_of(tmp_path)]
    assert found == [("mdn", None, 7, []), ("no-alpha-bound", None, 7, [])]
    assert "MDN, no alpha bound, seed 0, rate 0.001: diverged at step 7" in capsys.readouterr().out


def test_what_is_measured_of_a_model_that_knows_one_thing(tmp_path):
    """After every byte comes `a`: its probability is the same everywhere."""
    corpus = tiny_corpus(tmp_path)
    model = chain_model([ord("a")] * 257)
    model.embeddings[...] = jnp.ones_like(model.embeddings[...])
    model.lm_head[...] /= 32
    config = MDNConfig(**TINY_MODEL)
    _, params = split_model(model)
    trained = Trained(config, params, implementation="scan", dtype="float32")
    sizes = Sizes(
        tokens=256,
        sequence_length=128,
        domain_rows=3,
        position_length=128,
        position_rows=3,
        needle_lengths=(128,),
        needle_rows=4,
    )
    found = measure(trained, corpus, ByteTokenizer(), sizes)
    tokens = np.full((2, 128), ord("b"))
    targets = np.full((2, 128), ord("c"))
    losses, likeliest = trained(
        {"tokens": tokens, "segment_ids": np.zeros_like(tokens), "targets": targets}
    )
    assert (likeliest == ord("a")).all()
    other = losses[0, 0]  # nats of every byte but `a`
    assert found["needle"]["128"] == [0.0, pytest.approx(other, rel=1e-3)]
    assert found["position_documents"] == 3
    for bits in found["domains"].values():  # a few bytes are `a`
        assert 0.8 * other < bits * math.log(2) < other
    assert 0.8 * other < found["positions"][0][2] < other


def test_a_needle_that_is_found(tmp_path):
    from benchmarks.language import measure as module

    class Oracle:
        def __call__(self, batch):
            targets = np.asarray(batch["targets"])
            return np.zeros(targets.shape, np.float32), targets[:, -DIGITS:]

    sizes = Sizes(256, 64, 1, 128, 1, (100, 256), 4)
    text = module.NeedleText.of(lambda text: list(text.encode()))
    assert module._needles(Oracle(), text, sizes) == {"100": [1.0, 0.0], "256": [1.0, 0.0]}
    rows = needle_rows(jax.random.key(0), 3, 100, DIGITS, text)
    said = [bytes(np.asarray(row).tolist()) for row in rows.tokens]
    for row, targets in zip(said, np.asarray(rows.targets), strict=True):
        assert b" The pass key is " + bytes(targets[-DIGITS:].tolist()) + b". " in row
    with pytest.raises(ValueError, match="digits: expected a token each"):
        module.NeedleText.of(lambda text: [1, 2])


def test_bad_configurations(tmp_path):
    assert set(SMOKE) <= set(vars(LanguageConfig()))
    for values, message in (
        ({"mixers": ()}, "mixers: expected at least one model"),
        ({"seeds": ()}, "seeds: expected at least one, got none"),
        ({"learning_rates": ()}, "learning_rates: expected at least one, got none"),
        ({"mixers": ("gdn",), "ablations": ("no-momentum",)}, "ablations: expected mdn among"),
        ({"hybrids": ("mdn",), "layers": 2}, "layers: expected an int >= 4 with hybrids, got 2"),
        ({"corpus": tmp_path, "files": ("a",)}, "files: expected none with a corpus"),
        ({"minutes": 0}, "minutes: expected a number > 0 or None, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            LanguageConfig(**values)
    with pytest.raises(SystemExit, match="corpus: expected a directory of `python -m benchmarks"):
        language(LanguageConfig(corpus=tmp_path, commit="c"))
