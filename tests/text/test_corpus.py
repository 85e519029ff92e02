import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from mdn_jax.errors import RunError
from mdn_jax.text.corpus import load_corpus, read_texts
from mdn_jax.text.files import TextFiles, find_files, standard_library_files


def write(directory: Path, texts: dict[str, str]) -> str:
    for name, text in texts.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return str(directory / "**" / "*.txt")


def numbered(count: int) -> dict[str, str]:
    return {f"{i}.txt": f"document {i}" for i in range(count)}


def test_the_default_corpus_is_the_standard_library():
    files = standard_library_files()
    root = Path(sysconfig.get_path("stdlib"))
    assert root / "dataclasses.py" in files
    assert root / "json" / "decoder.py" in files
    assert all(path.suffix == ".py" and path.is_relative_to(root) for path in files)
    assert not any({"site-packages", "test"} & set(path.parts) for path in files)
    assert sum(path.stat().st_size for path in files) > 4e6


def test_a_standard_library_without_source_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(RunError, match=r"data\.files: expected the standard library.*found no"):
        load_corpus(TextFiles())


def test_split_is_deterministic_disjoint_and_complete(tmp_path):
    pattern = write(tmp_path, numbered(200))
    config = TextFiles(files=(pattern,), held_out_fraction=0.2)
    first, second = load_corpus(config), load_corpus(config)
    assert first == second
    assert not set(first.train) & set(first.held_out)
    assert set(first.train) | set(first.held_out) == {t.encode() for t in numbered(200).values()}
    assert 20 <= len(first.held_out) <= 60


def test_split_depends_on_nothing_but_the_content(tmp_path):
    here = write(tmp_path / "here", numbered(50))
    there = write(tmp_path / "there", {f"{99 - i}/a.txt": f"document {i}" for i in range(60)})
    one, other = (load_corpus(TextFiles(files=(p,), held_out_fraction=0.3)) for p in (here, there))
    assert set(one.held_out) < set(other.held_out)
    assert set(one.train) < set(other.train)
    assert one.fingerprint != other.fingerprint


def test_copies_are_one_document(tmp_path):
    pattern = write(tmp_path, {f"{i}.txt": "same" for i in range(9)} | {"other.txt": "other"})
    corpus = load_corpus(TextFiles(files=(pattern, pattern)))
    assert sorted(corpus.train + corpus.held_out) == [b"other", b"same"]


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_neither_set_is_empty(tmp_path, fraction):
    pattern = write(tmp_path, numbered(3))
    corpus = load_corpus(TextFiles(files=(pattern,), held_out_fraction=fraction))
    assert corpus.train
    assert corpus.held_out


def test_a_single_file_is_cut_at_its_end(tmp_path):
    write(tmp_path, {"a.txt": "0123456789" * 10})
    path = str(tmp_path / "a.txt")
    corpus = load_corpus(TextFiles(files=(path,), held_out_fraction=0.05))
    assert corpus.train == [b"0123456789" * 9 + b"01234"]
    assert corpus.held_out == [b"56789"]


def test_files_and_globs_name_each_file_once(tmp_path):
    write(tmp_path, {"a.txt": "a", "b/c.txt": "c"})
    patterns = (str(tmp_path / "a.txt"), str(tmp_path / "*.txt"), str(tmp_path / "**" / "*.txt"))
    found = [path for path, _ in find_files(TextFiles(files=patterns))]
    assert found == [tmp_path / "a.txt", tmp_path / "b" / "c.txt"]


def test_a_pattern_without_files_is_named(tmp_path):
    write(tmp_path, {"a.txt": "a"})
    pattern = str(tmp_path / "*.md")
    with pytest.raises(RunError, match=r"data\.files: expected a file or a glob.*\.md'.*none"):
        load_corpus(TextFiles(files=(str(tmp_path / "a.txt"), pattern)))
    (tmp_path / "hidden" / ".git").mkdir(parents=True)
    with pytest.raises(RunError, match=r"a directory without files that are not hidden"):
        load_corpus(TextFiles(files=(str(tmp_path / "hidden"),)))


def test_a_directory_is_all_files_within_it(tmp_path):
    write(tmp_path, {"a.txt": "a", "b/c.md": "c", "b/.d": "d", ".e/f": "f"})
    (tmp_path / "b" / "g.jsonl").write_text('{"text": "g"}')
    assert sorted(read_texts(TextFiles(files=(str(tmp_path),)))) == [b"a", b"c", b"g"]


def test_records_without_text_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{"text": ""}\n')
    (tmp_path / "b.txt").write_text("")
    empty = Counter()
    assert list(read_texts(TextFiles(files=(str(tmp_path),)), empty=empty)) == [b"a"]
    assert empty == {tmp_path / "a.jsonl": 2}


def test_files_without_text_are_named(tmp_path):
    pattern = write(tmp_path, {"a.txt": "", "b.txt": ""})
    with pytest.raises(RunError, match=r"data\.files: expected files with text.*2 file"):
        load_corpus(TextFiles(files=(pattern,)))
