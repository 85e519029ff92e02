"""Several sources with weights: proportions, positions, epochs, held-out losses, errors."""

import dataclasses
import json

import numpy as np
import pytest

from mdn_jax.errors import RunError
from tests.train.data.helpers import data_of
from tests.train.data.test_batches import read, run_of
from tests.train.helpers import assert_identical
from train.cli.configuration import parse
from train.config import from_dict, to_dict
from train.config_sections import DataConfig, SourceConfig
from train.data.batches import load_data
from train.loop import train
from train.metrics.log import read_metrics
from train.parallel.sharding import Share

LETTERS = "abc"


def texts_of(letter):
    """Documents that only one source has."""
    return [letter * (20 + i) for i in range(60)]


def mixture(directory, kinds=("text", "jsonl", "tokens"), weights=(1, 2, 5)):
    sources = []
    for letter, kind, weight in zip(LETTERS, kinds, weights, strict=False):
        data = data_of(kind, directory / letter, texts_of(letter))
        own = {"files": data.files, "dataset": data.dataset}
        sources.append(SourceConfig(name=letter, weight=weight, **own))
    return DataConfig(sources=tuple(sources), shuffle_buffer=16)


def source_of(row):
    """The letter that a row of tokens is of."""
    (letter,) = {chr(token) for token in row.tolist() if token < 256}
    return letter


@pytest.mark.parametrize("kinds", [("text", "jsonl", "tokens"), ("text", "stream")])
def test_a_position_in_a_mixture_is_exact(tmp_path, kinds):
    run = run_of(mixture(tmp_path / "data", kinds), tmp_path / "run")
    straight, end = read(run, 30)
    _, position = read(run, 11)
    resumed, again = read(run, 19, json.loads(json.dumps(position)))
    assert_identical(resumed, straight[11:])
    assert again == end


@pytest.mark.parametrize("kinds", [("text", "jsonl", "tokens"), ("stream", "text", "stream")])
def test_the_rows_are_in_proportion_to_the_weights(tmp_path, kinds):
    run = run_of(mixture(tmp_path / "data", kinds), tmp_path / "run")
    batches, _ = read(run, 40)
    letters = np.array([source_of(row) for batch in batches for row in batch["tokens"]])
    for letter, share in zip(LETTERS, (1 / 8, 2 / 8, 5 / 8), strict=True):
        drawn = np.cumsum(letters == letter)
        expected = share * np.arange(1, len(letters) + 1)
        assert np.abs(drawn - expected).max() < 2, letter
        np.testing.assert_array_equal(drawn[7::8], expected[7::8])


def test_each_source_has_epochs_of_its_own(tmp_path):
    run = run_of(mixture(tmp_path / "data"), tmp_path / "run")
    data = load_data(run)
    rows = {letter: sum(len(x) + 1 for x in texts_of(letter)) * 0.95 / 16 for letter in LETTERS}
    for letter, share in zip(LETTERS, (1 / 8, 2 / 8, 5 / 8), strict=True):
        assert data.epochs[f"epoch/{letter}"] == pytest.approx(4 * share / rows[letter], rel=0.15)
    batches, _ = read(run, 40)
    seen = [row.tobytes() for batch in batches for row in batch["tokens"] if source_of(row) == "c"]
    alone = dataclasses.replace(run, data=DataConfig(files=run.data.sources[2].files))
    expected = [row.tobytes() for batch in read(alone, 40)[0] for row in batch["tokens"]]
    assert seen == expected[: len(seen)]  # its rows are those of the source alone


def test_processes_share_a_mixture(tmp_path):
    run = run_of(mixture(tmp_path / "data"), tmp_path / "run")
    shares = [read(run, 6, share=Share(part, 2))[0] for part in range(2)]
    for step, batch in enumerate(read(run, 6)[0]):
        together = np.concatenate([share[step]["tokens"] for share in shares])
        np.testing.assert_array_equal(together, batch["tokens"])


def test_processes_share_a_mixture_with_a_stream(tmp_path):
    run = run_of(mixture(tmp_path / "data", ("text", "stream")), tmp_path / "run")
    alone = dataclasses.replace(run, data=DataConfig(files=run.data.sources[0].files))
    expected = [row.tobytes() for batch in read(alone, 3)[0] for row in batch["tokens"]]
    for part in range(2):
        with load_data(run).batches(Share(part, 2)) as batches:
            rows = [row for _ in range(6) for row in next(batches)["tokens"]]
        assert len(rows) == 12
        mine = [row.tobytes() for row in rows if source_of(row) == "a"]
        assert mine == expected[part::2][: len(mine)]  # of the file, each has its own


def test_what_a_mixture_is_known_by(tmp_path):
    run = run_of(mixture(tmp_path / "data"), tmp_path / "run")
    known = load_data(run).fingerprint
    other = dataclasses.replace(run.data.sources[0], weight=3)
    changed = dataclasses.replace(run.data, sources=(other, *run.data.sources[1:]))
    assert load_data(dataclasses.replace(run, data=changed)).fingerprint != known
    assert load_data(run).fingerprint == known
    assert from_dict(json.loads(json.dumps(to_dict(run)))) == run


def test_a_run_measures_every_source(tmp_path):
    data = mixture(tmp_path / "data", weights=(1, 1, 2))
    run = run_of(data, tmp_path / "run", vocab_size=257, sample_tokens=0)
    result = train(run)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert records[-1].keys() >= {f"held_out_loss/{letter}" for letter in LETTERS}
    losses = [records[-1][f"held_out_loss/{letter}"] for letter in LETTERS]
    assert min(losses) < result.held_out_loss < max(losses)
    assert len(set(losses)) == 3
    steps = [r for r in records if "epoch/a" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["epoch/a"] == pytest.approx(6 * steps[0]["epoch/a"], abs=1e-4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/*.txt=3", SourceConfig(files=("a/*.txt",), weight=3.0)),
        ("a=b.txt=0.5", SourceConfig(files=("a=b.txt",), weight=0.5)),
        (
            '{"files": ["x", "y"], "name": "z", "field": "body"}',
            SourceConfig(files=("x", "y"), name="z", field="body"),
        ),
    ],
)
def test_a_source_is_a_flag(text, expected):
    config = parse(["smoke", "--data.sources", text, "b=1"])
    assert config.data.sources == (expected, SourceConfig(files=("b",)))


def test_sources_in_a_file(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text(
        '[[data.sources]]\nfiles = ["a", "b"]\nweight = 3\n[[data.sources]]\ndataset = "c"'
    )
    sources = parse([str(file)]).data.sources
    assert sources == (SourceConfig(files=("a", "b"), weight=3.0), SourceConfig(dataset="c"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", "expected PATHS=WEIGHT or an object like"),
        ("a=0", "data.sources.weight: expected a finite number > 0, got 0.0"),
        ('{"file": "a"}', "data.sources.file: expected one of"),
        ('{"files": "a"}', "data.sources.files: expected a list of strings, got 'a'"),
        ("{}", "data.sources.files: expected names of files, or a dataset"),
    ],
)
def test_a_flag_that_is_no_source_is_named(capsys, text, expected):
    with pytest.raises(SystemExit):
        parse(["smoke", "--data.sources", text])
    output = capsys.readouterr()
    assert expected in " ".join((output.out + output.err).replace("│", " ").split())


def test_errors_name_the_source(tmp_path):
    data = mixture(tmp_path / "data")
    gone = dataclasses.replace(data.sources[1], files=(str(tmp_path / "none"),))
    short = dataclasses.replace(data.sources[1], files=(str(tmp_path / "short.txt"),))
    (tmp_path / "short.txt").write_text("short")
    for source, message in (
        (gone, r"b: data\.files: expected a file or a glob"),
        (short, r"b: data\.files: expected at least sequence_length \+ 1"),
        (dataclasses.replace(data.sources[1], name="a"), r"data\.sources: expected a name of its"),
    ):
        run = run_of(DataConfig(sources=(data.sources[0], source)), tmp_path / "run")
        with pytest.raises(RunError, match=message):
            load_data(run)
    with pytest.raises(ValueError, match=r"data\.files: expected none beside data\.sources"):
        dataclasses.replace(data, files=("a",))


def test_a_source_without_a_name_has_that_of_its_path():
    for path, name in (("x/books/**/*.txt", "books"), ("a.jsonl", "a.jsonl"), ("*.txt", "files")):
        assert SourceConfig(files=(path,)).title == name
