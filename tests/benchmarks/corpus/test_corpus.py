"""`python -m benchmarks corpus`: from packages made here to shards, twice."""

import gzip
import io
import json
import random
import shutil
import subprocess
import tarfile
import zipfile
from itertools import batched

import pytest

from benchmarks.corpus import command, packages, recipe, texts
from benchmarks.corpus.command import CorpusConfig, corpus
from benchmarks.corpus.documents import Copies
from benchmarks.corpus.manifest import HELD_OUT
from mdn_jax.text.corpus import digest_of, place
from mdn_jax.text.tokenizer import make_tokenizer
from train.data.shards import open_shards

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
RECIPE = """
[code]
most_mb = 1
suffixes = [".py", ".c", ".java"]
without = ["old/"]
[code.packages]
alpha = ["lib/", "inner/", "java/"]
gone = []

[words]
most_mb = 0.02
suffixes = [".txt"]
[words.packages]
beta = []
"""
TERMS = b"Files: *\nLicense: MIT\n\nFiles: a\nLicense: GPL-2+\n\nFiles: b\nLicense: MIT\n"


def source(i):
    rng = random.Random(i)
    names = ["".join(rng.choices("abcdefgh", k=6)) for _ in range(36)]
    lines = [
        f"def {a}(x):\n    return x + {b} * {c}(x) if x else {c}(0)\n\n"
        for a, b, c in batched(names, 3)
    ]
    return "".join(lines)


def archive(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def zipped(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
    return out.getvalue()


def build(directory, name, files):
    root = directory / name
    (root / "DEBIAN").mkdir(parents=True)
    control = f"Package: {name}\nVersion: 1:2-3\nArchitecture: all\nMaintainer: A <a@b.c>\n"
    (root / "DEBIAN" / "control").write_text(control + "Description: text\n")
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    out = directory / f"{name}.deb"
    command = ["dpkg-deb", "--root-owner-group", "-Znone", "-b", str(root), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return out


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """Two packages in place of a distribution's, and what was asked for."""
    code = {f"usr/lib/m{i}.py": source(i).encode() for i in range(40)}
    code |= {
        "usr/lib/copy.py": source(1).encode(),
        "usr/lib/near.py": (source(2) + "# a line of its own, behind all the others\n").encode(),
        "usr/lib/old/x.py": source(98).encode(),
        "usr/other/left.py": source(99).encode(),
        "usr/lib/zero.py": b"x\0" * 300,
        "usr/share/doc/alpha/copyright": TERMS,
        "usr/src/all.tar.gz": archive({"inner/x.c": b"int x;\n" + source(50).encode()}),
        "usr/lib/src.zip": zipped({"java/A.java": source(51).encode(), "B.txt": b"no"}),
    }
    words = {f"usr/{i}.txt.gz": gzip.compress(source(100 + i).encode()) for i in range(60)}
    files = {"alpha": build(tmp_path, "alpha", code), "beta": build(tmp_path, "beta", words)}
    asked = []

    def find(name):
        if name not in files:
            raise packages.Unavailable("not in apt's lists of packages")
        asked.append(name)
        return packages.Package(name, "1:2-3", packages.file_sha256(files[name]), 1)

    monkeypatch.setattr(texts, "find", find)
    monkeypatch.setattr(texts, "fetch", lambda package, directory: files[package.name])
    monkeypatch.setattr(command, "check_tools", lambda: None)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path, asked


@needs_dpkg
def test_a_corpus_from_packages(debian, capsys):
    tmp_path, asked = debian
    config = CorpusConfig(
        output=tmp_path / "out",
        recipe=tmp_path / "recipe.toml",
        test_fraction=0.25,
        vocabulary=512,
        processes=1,
    )
    corpus(config)
    out = capsys.readouterr().out
    assert "gone: left out: not in apt's lists" in out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["missing"] == [{"name": "gone", "reason": "not in apt's lists of packages"}]
    alpha, beta = manifest["sources"]
    assert (alpha["version"], alpha["licence"]) == ("1:2-3", "MIT; GPL-2+")
    assert (alpha["files"], alpha["documents"]) == (46, 45)
    assert alpha["left_out"] == {"a zero byte": 1}
    assert beta["licence"].startswith("in the copyright file of another")
    code, words = manifest["domains"]
    assert code["exact"] == len(source(1)) - 1
    assert len(source(2)) <= code["near"] <= len(source(2)) + 60
    assert code["train_documents"] + code["test_documents"] == 42
    assert words["train"] + words["test"] <= 20_000 < words["found"]
    assert min(words["train_documents"], words["test_documents"]) > 2

    texts_of = {
        part: [
            json.loads(line)["text"]
            for line in (tmp_path / "out" / part / "code.jsonl").read_text().splitlines()
        ]
        for part in ("documents", "test")
    }
    assert not any(source(98).strip() in text for part in texts_of.values() for text in part)
    assert all(place(digest_of(t.encode())) < 0.75 for t in texts_of["documents"])
    assert all(place(digest_of(t.encode())) >= 0.75 for t in texts_of["test"])
    shards = tmp_path / "out" / "shards"
    tokenizer = make_tokenizer(str(shards / "documents" / "tokenizer.json"), None)
    assert tokenizer.vocab_size == 512
    paths = sorted((shards / "test" / "code").glob("*.tokens"))
    opened = open_shards(paths, tokenizer, held_out_fraction=HELD_OUT, verify=True)
    assert sum(map(len, opened[:2])) == len(texts_of["test"])
    sizes = {one["directory"]: one for one in manifest["shards"]}
    assert set(sizes) == {"shards/documents", "shards/test/code", "shards/test/words"}
    assert 0 < sizes["shards/documents"]["compressed"] < sizes["shards/documents"]["bytes"]

    before = (tmp_path / "out" / "manifest.md").read_text()
    asked.clear()
    corpus(config)  # all of it is there
    assert asked == []
    assert (tmp_path / "out" / "manifest.md").read_text() == before
    again = CorpusConfig(
        **{**vars(config), "output": tmp_path / "again", "cache": tmp_path / "out"}
    )
    corpus(again)  # the same, from the same texts
    other = json.loads((tmp_path / "again" / "manifest.json").read_text())
    for one in (*manifest["shards"], *other["shards"]):
        one.pop("compressed")  # a shard's header names the files that it is made of
    assert other == manifest
    for name in ("tokenizer.json", "documents/code.jsonl", "test/words.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    with pytest.raises(SystemExit, match="output: expected a new directory, or one of the same"):
        corpus(CorpusConfig(**{**vars(config), "scale": 0.5}))


def test_nothing_can_be_had(tmp_path, monkeypatch):
    def find(name):
        raise packages.Unavailable("apt-get download: no network")

    monkeypatch.setattr(texts, "find", find)
    monkeypatch.setattr(command, "check_tools", lambda: None)
    with pytest.raises(SystemExit, match=r"got none of \d+: apt-get download: no network"):
        corpus(CorpusConfig(output=tmp_path))


def test_no_debian(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="expected a Debian system with apt-cache, apt-get"):
        packages.check_tools()


def test_apt_says_no(tmp_path, monkeypatch):
    class Done:
        stdout, stderr, returncode = "", "W: a\nE: Failed to fetch b\nE: c\n", 100

    monkeypatch.setattr(packages, "_run", lambda command, directory: Done)
    with pytest.raises(packages.Unavailable, match="not in apt's lists"):
        packages.find("alpha")
    package = packages.Package("alpha", "1", "0" * 64, 5)
    with pytest.raises(packages.Unavailable, match="apt-get download: Failed to fetch b"):
        packages.fetch(package, tmp_path)


def test_licences():
    assert packages.licences(TERMS) == "MIT; GPL-2+"
    assert packages.licences(gzip.compress(b"License: A\nLicense: B\nLicense: B\n")) == "B; A"
    assert packages.licences(b"It is free.\n") == "in words, see its debian/copyright"
    assert packages.licences(b"License: " + b"may be copied " * 9) == packages.licences(b"")
    many = b"".join(b"License: L%d\n" % i for i in range(8))
    assert packages.licences(many) == "L0; L1; L2; L3; L4; L5 and 2 more"


def test_copies():
    copies = Copies()
    first = "A paragraph that is longer than forty characters, number 1.\n\n" + "Other text. " * 9
    assert not copies.is_exact(b"1")
    assert copies.is_exact(b"1")
    assert not copies.is_near(first)
    assert copies.is_near(first.upper().replace("1", "7"))
    assert not copies.is_near("Something that is all new and of another kind than that. " * 3)
    notice = "A paragraph that is longer than forty characters, number 2.\n\n"
    assert not copies.is_near(notice + "But what follows it is of its own making entirely. " * 3)


def test_the_recipe(tmp_path):
    domains = recipe.read_recipe()
    assert sum(domain.most_mb for domain in domains) > 600
    path = tmp_path / "recipe.toml"
    path.write_text("[a]\nmost_mb = 1\n")
    with pytest.raises(SystemExit, match="recipe: expected domains with most_mb, suffixes"):
        recipe.read_recipe(path)
    part = "[{}]\nmost_mb = 1\nsuffixes = []\n[{}.packages]\nx = []\n"
    path.write_text("[a]\nmost_mb = 1\nsuffixes = []\n[a.packages]\nlinux-6.1 = []\n")
    with pytest.raises(SystemExit, match="expected a list of parts of paths"):
        recipe.read_recipe(path)
    path.write_text(part.format("a", "a") + part.format("b", "b"))
    with pytest.raises(SystemExit, match="every package once, got x twice"):
        recipe.read_recipe(path)
    with pytest.raises(SystemExit, match="recipe: expected a file"):
        recipe.read_recipe(tmp_path / "none.toml")


def test_bad_arguments(tmp_path, monkeypatch):
    for values, message in (
        ({"scale": 0}, "scale: expected a number > 0, got 0"),
        ({"test_fraction": 1}, "test_fraction: expected a number above 0 and below 1"),
        ({"vocabulary": 100}, "vocabulary: expected from 512 to 65536, got 100"),
        ({"processes": 0}, "processes: expected an int >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            CorpusConfig(**values)
    monkeypatch.setattr(command, "check_tools", lambda: None)
    with pytest.raises(SystemExit, match=r"domains: expected some of prose, .*got 'poems'"):
        corpus(CorpusConfig(domains=("poems",), output=tmp_path))
