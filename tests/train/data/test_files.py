"""Documents in files: each once, whatever the pieces; what is wrong is named."""

import gzip
import sys
from pathlib import Path

import pytest

from tests.train.data.helpers import TEXTS, write_jsonl, write_parquet
from train.data.files import Piece, cut_files, find_files, read_documents
from train.errors import RunError
from train.sections import DataConfig

WHOLE = 1 << 62


def read(*files, size=WHOLE, field="text", utf8=False, **config):
    found = find_files(DataConfig(files=tuple(map(str, files)), **config))
    pieces = list(cut_files(found, size=size))
    texts = [t for piece in pieces for t in read_documents(piece, field, utf8=utf8)]
    return [text.decode(errors="surrogateescape") for text in texts], pieces


@pytest.mark.parametrize("size", [1, 7, 100, 1000, WHOLE])
def test_every_line_is_in_one_piece(tmp_path, size):
    texts, pieces = read(write_jsonl(tmp_path / "a.jsonl"), size=size)
    assert texts == TEXTS
    assert sum(piece.size for piece in pieces) == (tmp_path / "a.jsonl").stat().st_size
    assert (len(pieces) > 1) == (size < WHOLE)


@pytest.mark.parametrize("size", [1, 900, WHOLE])
def test_every_row_is_in_one_piece(tmp_path, size):
    texts, pieces = read(write_parquet(tmp_path / "a.parquet"), size=size)
    assert texts == TEXTS
    assert len(pieces) <= 9  # row groups are not cut
    assert (len(pieces) > 1) == (size < WHOLE)


def test_empty_documents_and_lines_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n  \n{"text": ""}\n{"text": "b"}')
    assert read(tmp_path / "a.jsonl")[0] == ["a", "b"]
    assert read(write_parquet(tmp_path / "a.parquet", ["", "x"]))[0] == ["x"]


def test_compressed_files(tmp_path):
    write_jsonl(tmp_path / "plain.jsonl")
    data = gzip.compress((tmp_path / "plain.jsonl").read_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one text"))
    assert read(tmp_path / "a.jsonl.gz", size=10)[0] == TEXTS
    assert read(tmp_path / "a.txt.gz")[0] == ["one text"]
    for broken in (data[:-20], data[:40] + b"\0" * 40 + data[80:]):
        (tmp_path / "b.jsonl.gz").write_bytes(broken)
        with pytest.raises(RunError, match=r"expected readable files, got .*b\.jsonl\.gz: \w+"):
            read(tmp_path / "b.jsonl.gz")


def test_the_suffix_says_what_a_file_is_unless_format_does(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    assert read(path, format="text")[0] == [path.read_text()]
    renamed = path.rename(tmp_path / "a.data")
    assert read(renamed, format="jsonl")[0] == TEXTS


@pytest.mark.parametrize("layout", ["data/{}-00000-of-00001.parquet", "{}.parquet", "{}/0.parquet"])
def test_a_directory_as_hugging_face_lays_it_out(tmp_path, layout):
    write_parquet(tmp_path / layout.format("train"), ["a", "b"])
    write_parquet(tmp_path / layout.format("test"), ["c"])
    assert read(tmp_path)[0] == ["a", "b"]
    assert read(tmp_path, split="test")[0] == ["c"]
    with pytest.raises(RunError, match=r"data\.split: expected a split in .*, got 'dev'.*train"):
        read(tmp_path, split="dev")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"expected a line of JSON, got b'\{\"text\": \"cut"),
        ('["a"]', "expected a JSON object, got list"),
        ('{"content": "a"}', r"data\.field: expected one of \['content'\], got 'text'"),
        ('{"text": 3}', "text: expected a string, got int"),
        ('{"text": null}', "text: expected a string, got NoneType"),
        ('{"text": "\\ud800"}', "text: expected text, got half of a surrogate pair"),
        (b"\xff\xfe", "expected a line of JSON"),
    ],
)
@pytest.mark.parametrize("size", [60, WHOLE])
def test_a_corrupt_line_is_named_by_its_number(tmp_path, line, message, size):
    path = write_jsonl(tmp_path / "a.jsonl")
    lines = path.read_bytes().splitlines()
    lines[41] = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(RunError, match=rf"a\.jsonl:42: {message}"):
        read(path, size=size)


def test_what_is_wrong_with_parquet_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["a"] * 20 + [None], group=5)
    with pytest.raises(RunError, match=r"data\.field: expected one of \['text', 'id'\].*'content'"):
        read(path, field="content")
    with pytest.raises(RunError, match=r"data\.field: expected text in 'id' of .*, got int64"):
        read(path, field="id")
    with pytest.raises(RunError, match=r"a\.parquet: expected text in row 20, got null"):
        read(path, size=1)
    data = write_parquet(path).read_bytes()
    for broken in (data[:-100], data[:40] + b"\xff" * 200 + data[240:], b""):
        path.write_bytes(broken)
        with pytest.raises(RunError, match=r"expected readable files, got .*a\.parquet: \w+"):
            read(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere")
    for format in ("text", "jsonl", "parquet"):
        piece = Piece(tmp_path / "a.txt", format, 0, None, 1)
        with pytest.raises(RunError, match=r"got .*a\.txt: .*No such file"):
            list(read_documents(piece, "text"))


def test_text_that_is_not_utf8_is_named_where_it_has_to_be(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    assert len(read(tmp_path / "a.txt")[0]) == 1
    with pytest.raises(RunError, match=r"data\.tokenizer: expected UTF-8.*a\.txt: .* at byte 3"):
        read(tmp_path / "a.txt", utf8=True)


def test_shards_and_text_together_are_refused(tmp_path):
    for name in ("a.tokens", "b.txt"):
        (tmp_path / name).write_text("x")
    with pytest.raises(RunError, match=r"data\.files: expected shards of mdn-tokenize alone"):
        read(tmp_path / "*")


def test_parquet_without_its_library(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(RunError, match=r"needs pyarrow: pip install 'mdn-jax\[huggingface\]'"):
        read(path)


def test_find_files_sorts_and_names_each_once(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text("x")
    found = find_files(DataConfig(files=(str(tmp_path / "b.txt"), str(tmp_path / "*.txt"))))
    assert [(Path(path).name, format) for path, format in found] == [
        ("a.txt", "text"),
        ("b.txt", "text"),
    ]
