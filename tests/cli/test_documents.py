"""Every command reads files as training does, and says the same of those that it cannot read."""

import gzip
import json

import pytest

from mdn_jax.cli import documents, evaluate, inspect_checkpoint
from mdn_jax.cli.documents import TextConfig, open_documents
from mdn_jax.errors import RunError
from mdn_jax.text.corpus import load_corpus
from mdn_jax.text.files import TextFiles
from mdn_jax.text.text import ByteText, FileText
from tests.text.helpers import TEXTS, write_bpe, write_hostile, write_jsonl, write_parquet
from tests.train.data.helpers import data_of
from train.cli import tokenize


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """The documents as a command has them, for a checkpoint of bytes or of other tokens."""

    def read(*files, text=None, **options):
        monkeypatch.setattr(documents, "open_checkpoint", lambda config: (None, text or ByteText()))
        config = TextConfig(checkpoint=tmp_path, files=tuple(map(str, files)), **options)
        return open_documents(config)[2]

    return read


def test_documents_are_those_of_training_with_every_copy(tmp_path, opened):
    texts = [*TEXTS, TEXTS[3], "", "é\u2028\r\n"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i:03}.txt").write_bytes(text.encode())
    lines = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    (tmp_path / "blob").write_bytes(lines.read_bytes())
    (tmp_path / "link.ndjson").symlink_to("blob")
    write_parquet(tmp_path / "set" / "data" / "test-0.parquet", texts)
    expected = [text for text in texts if text]
    for name in ("*.txt", "a.jsonl", "b.jsonl.gz", "link.ndjson", "set/data/*.parquet"):
        assert opened(tmp_path / name) == expected, name
    assert opened(tmp_path / "set", split="test") == expected
    assert opened(tmp_path / "blob", format="jsonl") == expected
    assert opened(lines, format="text") == [lines.read_text()]
    body = lines.read_text().replace('"text"', '"body"')
    lines.write_text(body)
    assert opened(lines, field="body") == expected


def test_home_is_found(tmp_path, opened, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl")
    assert opened("~/*.jsonl") == TEXTS
    assert tokenize.main(["~/out", "--files", "~/a.jsonl", "--processes", "1"]) == 0
    assert list((tmp_path / "out").glob("*.tokens"))


def test_bytes_that_are_no_utf8_are_for_models_of_bytes(tmp_path, opened):
    (tmp_path / "a.txt").write_text("first é")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    assert [t.encode(errors="surrogateescape") for t in opened(tmp_path / "*")] == [
        "first é".encode(),
        b"caf\xe9",
    ]
    other = FileText(write_bpe(tmp_path / "bpe"))
    assert opened(tmp_path / "a.txt", text=other) == ["first é"]
    with pytest.raises(RunError, match=r"^tokenizer: expected UTF-8 .* got .*b\.txt: .* at byte 3"):
        opened(tmp_path / "*.txt", text=other)


def test_what_cannot_be_read_is_the_same_line_everywhere(tmp_path, capsys):
    paths = write_hostile(tmp_path / "data")
    assert len(paths) == 17
    for path in paths:
        with pytest.raises(RunError) as error:
            load_corpus(TextFiles(files=(str(path),)))
        expected = str(error.value)
        assert expected.isprintable()
        assert str(path) in expected
        files = ["--files", str(path)]
        assert tokenize.main([str(tmp_path / path.name), *files, "--processes", "1"]) == 1
        if path.name != "empty.txt":
            assert capsys.readouterr().err == f"python -m train tokenize: error: {expected}\n"
        here = expected.removeprefix("data.").replace(": data.field", ": field")
        capsys.readouterr()
        assert evaluate.main(["perplexity", str(tmp_path / "run"), *files]) == 1
        assert capsys.readouterr().err == f"mdn-eval: error: {here}\n"
        assert inspect_checkpoint.main([str(tmp_path / "run"), *files]) == 1
        assert capsys.readouterr().err == f"mdn-inspect: error: {here}\n"


def test_shards_are_no_text(tmp_path, capsys):
    (shards,) = data_of("tokens", tmp_path / "data").files
    assert evaluate.main(["perplexity", str(tmp_path), "--files", shards]) == 1
    assert "error: files: expected text, JSONL or Parquet, got shards" in capsys.readouterr().err


def test_no_files_are_not_the_standard_library(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["perplexity", str(tmp_path), "--files"])
    assert "files: expected at least one name" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["a.txt", "a.txt/below"])
def test_an_output_that_is_no_directory_is_named(tmp_path, capsys, place):
    (tmp_path / "a.txt").write_text("text")
    output = str(tmp_path / place)
    arguments = [output, "--files", str(tmp_path / "a.txt"), "--processes", "1"]
    assert tokenize.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        f"python -m train tokenize: error: output: expected a directory to write to, got {output}"
    )


def test_odd_names_are_shown_in_one_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    output = str(tmp_path / "o\udcffut\n")
    assert tokenize.main([output, "--files", str(tmp_path / "a.txt"), "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    assert "o\\udcffut\\n" in out
    (tmp_path / "b\nc.jsonl").write_text(json.dumps([1]))
    assert evaluate.main(["perplexity", "run", "--files", str(tmp_path / "*.jsonl")]) == 1
    assert "b\\nc.jsonl':1: expected a JSON object, got list" in capsys.readouterr().err
