"""What a name leads to: links, directories, and folders with things in them that are no files."""

import gzip
import os
import socket
from pathlib import Path

import pytest

from mdn_jax.errors import RunError
from mdn_jax.text.corpus import load_corpus, read_texts
from mdn_jax.text.files import TextFiles, find_files
from tests.text.helpers import TEXTS, write_jsonl, write_parquet


def names(*files, **config):
    return [path.name for path, _ in find_files(TextFiles(files=tuple(map(str, files)), **config))]


def corpus(*files, **config):
    return load_corpus(TextFiles(files=tuple(map(str, files)), held_out_fraction=0.2, **config))


def texts(*files, **config):
    found = read_texts(TextFiles(files=tuple(map(str, files)), **config))
    return [text.decode() for text in found]


def link(place, target):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(os.path.relpath(target, place.parent))
    return place


def refused(*files):
    with pytest.raises(RunError) as error:
        find_files(TextFiles(files=tuple(map(str, files))))
    message = str(error.value)
    assert message.isprintable()  # of one line
    return message


@pytest.fixture
def hub(tmp_path):
    """The same files by themselves, and as links to files without a suffix, in another order."""
    plain, snapshot = tmp_path / "plain", tmp_path / "hub" / "snapshots" / "main"
    thirds = TEXTS[:20], TEXTS[20:40], TEXTS[40:]
    (plain / "more").mkdir(parents=True)
    for i, texts in enumerate(thirds):
        write_parquet(plain / "data" / f"train-{i}.parquet", texts)
        write_parquet(plain / "data" / f"test-{i}.parquet", [f"{i}"])
        write_jsonl(plain / "more" / f"{i}.JSONL", texts)
        (plain / "more" / f"{i}.jsonl.gz").write_bytes(
            gzip.compress((plain / "more" / f"{i}.JSONL").read_bytes())
        )
        (plain / f"{i}.txt.gz").write_bytes(gzip.compress(texts[0].encode()))
    paths = sorted(path for path in plain.rglob("*") if path.is_file())
    blobs = tmp_path / "hub" / "blobs"
    blobs.mkdir(parents=True)
    for i, path in enumerate(paths):
        blob = blobs / f"{len(paths) - i:03}ab"
        blob.write_bytes(path.read_bytes())
        link(snapshot / path.relative_to(plain), blob)
    return plain, snapshot


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("", 60),
        ("data", 60),
        ("data/train-1.parquet", 20),
        ("more/2.JSONL", 20),
        ("more/*.jsonl.gz", 60),
        ("**/*.JSONL", 60),
        ("*.txt.gz", 3),
    ],
)
def test_links_are_the_files_that_they_lead_to(hub, name, count):
    plain, linked = (corpus(os.path.join(directory, name)) for directory in hub)
    assert plain == linked
    assert len(linked.train) + len(linked.held_out) == count


@pytest.mark.parametrize("name", ["", "data", "**/train-*.parquet"])
def test_directories_behind_links_are_entered(hub, tmp_path, name):
    plain, snapshot = hub
    link(tmp_path / "latest", snapshot)
    link(tmp_path / "apart" / "data", plain / "data")  # the directory below is the link
    expected = corpus(os.path.join(plain, name))
    for directory in ("latest", "apart"):
        assert corpus(tmp_path / directory / name) == expected


def test_shards_behind_links_are_all_of_their_directory(tmp_path):
    for i in range(2):
        (tmp_path / f"blob{i}").write_bytes(b"")
        link(tmp_path / "shards" / f"0000{i}-of-00002.tokens", tmp_path / f"blob{i}")
    found = find_files(TextFiles(files=(str(tmp_path / "shards"),)))
    assert [(path.parent.name, format) for path, format in found] == [("shards", "tokens")] * 2


def test_a_file_with_several_names_is_one_by_the_first(tmp_path):
    write_jsonl(tmp_path / "z.jsonl")
    link(tmp_path / "a.txt", tmp_path / "z.jsonl")
    link(tmp_path / "same", tmp_path)
    assert names(tmp_path / "z.jsonl", tmp_path / "*") == ["z.jsonl"]
    assert names(tmp_path / "*", tmp_path / "z.jsonl") == ["a.txt"]
    assert names(tmp_path / "same" / "z.jsonl", tmp_path / "**" / "*.jsonl") == ["z.jsonl"]
    assert len(corpus(tmp_path / "z.jsonl", tmp_path / "*.txt", tmp_path / "same/*").train) > 40


def test_links_that_lead_back_are_entered_once(tmp_path):
    for i in range(12):  # each leads to all: 12! ways
        for j in range(12):
            link(tmp_path / f"d{i:02}" / f"to{j:02}", tmp_path / f"d{j:02}")
        (tmp_path / f"d{i:02}" / f"{i:02}.txt").write_text(f"{i}")
    expected = [f"{i:02}.txt" for i in range(12)]
    assert names(tmp_path / "**" / "*.txt") == expected
    assert names(tmp_path / "**" / "**" / "to03" / "**" / "*.txt") == expected
    assert names(tmp_path / "d05" / "**") == expected


def test_links_to_nowhere_and_in_circles_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    link(tmp_path / "b.txt", tmp_path / "gone" / "blob")
    link(tmp_path / "c.md", tmp_path / "c.md")
    link(tmp_path / "d" / "train-0.parquet", tmp_path / "gone")
    assert "b.txt (a link to gone/blob): No such file" in refused(tmp_path / "*.txt")
    assert "b.txt (a link to gone/blob): No such file" in refused(tmp_path / "b.txt")
    assert "c.md (a link to c.md): Too many levels" in refused(tmp_path / "**" / "*.md")
    assert "train-0.parquet (a link to ../gone): No such" in refused(tmp_path / "d")
    assert names(tmp_path / "a*") == ["a.txt"]  # the others were not asked for


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe.txt")
    link(tmp_path / "sub" / "null.jsonl", Path("/dev/null"))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.md")
    assert refused("*.txt").endswith("got pipe.txt, which is a pipe")
    assert refused("pipe.txt").endswith("got pipe.txt, which is a pipe")
    assert refused("*").endswith("got pipe.txt, which is a pipe")
    assert refused("sub/**").endswith("null.jsonl, which is a device")
    assert refused("**/*.md").endswith("socket.md, which is a socket")
    os.mkfifo(tmp_path / "sub" / "train-0.parquet")
    assert refused(tmp_path / "sub").endswith("train-0.parquet, which is a pipe")


def test_names_that_are_no_text_are_read_and_shown_in_one_line(tmp_path):
    odd = ["a\nb.txt", "c\udcff.txt", "[d]*?.txt", "**.txt", " .txt"]
    for i, name in enumerate(odd):
        (tmp_path / name).write_text(f"text {i}")
        assert names(tmp_path / name) == [name]  # a name comes before a glob
    found = corpus(tmp_path / "*.txt")
    assert len(found.train + found.held_out) == len(odd)
    for name, displayed in (("e\nf.txt", r"e\nf.txt"), ("g\udcfe.txt", r"g\udcfe.txt")):
        link(tmp_path / name, tmp_path / "gone")
        assert displayed in refused(tmp_path / name)
        (tmp_path / name).unlink()


def test_hidden_files_are_left_out_unless_they_are_named(tmp_path):
    for name in (".hidden/a.txt", ".b.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert names(tmp_path / "**" / "*") == names(tmp_path / "**") == ["c.txt"]
    assert names(tmp_path / ".hidden" / "**" / "*", tmp_path / ".b.txt") == [".b.txt", "a.txt"]


def test_a_directory_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a.txt").write_text("text")
    (tmp_path / "shut").mkdir()
    scandir = os.scandir

    def refusing(path="."):
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert "/shut: Permission denied" in refused(tmp_path / "**" / "*.txt")


def test_home_is_found_in_every_form(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").mkdir()
    write_jsonl(tmp_path / "a" / "b.jsonl")
    write_parquet(tmp_path / "c" / "train-0.parquet")
    assert names("~/a/b.jsonl") == names("~/a/*") == names("~/**/*.jsonl") == ["b.jsonl"]
    assert names("~/c") == ["train-0.parquet"]
    assert names("~/a") == ["b.jsonl"]
    assert "'~nobody-here/x'" in refused("~nobody-here/x")


@pytest.mark.parametrize("layout", ["data/{}-00000-of-00001.parquet", "{}.parquet", "{}/0.parquet"])
def test_a_directory_as_hugging_face_lays_it_out(tmp_path, layout):
    write_parquet(tmp_path / layout.format("train"), ["a", "b"])
    write_parquet(tmp_path / layout.format("test"), ["c"])
    assert texts(tmp_path) == ["a", "b"]
    assert texts(tmp_path, split="test") == ["c"]
    with pytest.raises(RunError, match=r"data\.split: expected a split in .*, got 'dev'.*train"):
        texts(tmp_path, split="dev")


def test_shards_and_text_together_are_refused(tmp_path):
    for name in ("a.tokens", "b.txt"):
        (tmp_path / name).write_text("x")
    assert refused(tmp_path / "*").startswith("data.files: expected shards of tokens alone")


def test_find_files_sorts_and_names_each_once(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text("x")
    assert names(tmp_path / "b.txt", tmp_path / "*.txt") == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.JSONL", "jsonl"),
        ("a.ndjson.GZ", "jsonl"),
        ("a.Parquet", "parquet"),
        ("a.jsonl.bak", "text"),
        ("jsonl", "text"),
        ("x.jsonl/a", "text"),
    ],
)
def test_a_format_is_of_the_last_suffix(tmp_path, name, format):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    assert [x for _, x in find_files(TextFiles(files=(str(tmp_path / name),)))] == [format]
