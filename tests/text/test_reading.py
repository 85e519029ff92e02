"""Documents in files: each once, whatever the pieces; what is wrong is named."""

import bz2
import contextlib
import gzip
import lzma
import random
import re
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mdn_jax.errors import RunError
from mdn_jax.text.files import TextFiles, find_files
from mdn_jax.text.reading import Piece, cut_files, read_documents
from tests.text.helpers import TEXTS, write_jsonl, write_parquet

WHOLE = 1 << 62


def read(*files, size=WHOLE, field="text", utf8=False, **config):
    found = find_files(TextFiles(files=tuple(map(str, files)), **config))
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
        ('{"text": ' + "[" * 100_000, r"expected a line of JSON, got b'\{\"text\": \[\["),
        ('{"a": ' * 100_000, r"expected a line of JSON, got b'\{\"a\": \{"),
        ('{"n": 1' + "0" * 5000 + "}", "expected a line of JSON"),
        (
            "{" + ", ".join(f'"{i:04}": ""' for i in range(2000)) + "}",
            r"data\.field: expected one of \['0000', .* '0019'\] and 1980 more, got 'text'",
        ),
    ],
)
@pytest.mark.parametrize("size", [60, WHOLE])
def test_a_corrupt_line_is_named_by_its_number(tmp_path, line, message, size):
    path = write_jsonl(tmp_path / "a.jsonl")
    lines = path.read_bytes().splitlines()
    lines[41] = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(RunError, match=rf"a\.jsonl:42: {message}") as error:
        read(path, size=size)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


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


def test_parquet_without_its_library(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(RunError, match=r"needs pyarrow: install .* the extra 'huggingface'"):
        read(path)


BINARY = {
    "a zip archive": b"PK\x03\x04\x14\x00 and so on",
    "compressed by gzip": gzip.compress(b"some text"),
    "compressed by bzip2": bz2.compress(b"some text"),
    "compressed by xz": lzma.compress(b"some text"),
    "compressed by Zstandard": b"\x28\xb5\x2f\xfd some text",
    "Parquet": b"PAR1 some text PAR1",
    "a shard of tokens": b"MDNTOK01{}",
    "UTF-16 or UTF-32": "some text".encode("utf-16"),
    r"binary \(a zero at byte 9\)": b"some text\0",
    r"binary \(a zero at byte 1\)": "some text".encode("utf-16-le"),
    r"binary \(a zero at byte 5\)": b"\x93NUMPY"[:5] + b"\0",
}


@pytest.mark.parametrize("kind", BINARY)
@pytest.mark.parametrize("utf8", [True, False])
def test_what_is_no_text_is_named(tmp_path, kind, utf8):
    (tmp_path / "a.data").write_bytes(BINARY[kind])
    with pytest.raises(RunError, match=rf"data\.files: expected text, got .*a\.data, .* {kind};"):
        read(tmp_path / "a.data", utf8=utf8)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(BINARY[kind]))  # and within
    with pytest.raises(RunError, match=rf"expected text, got .*b\.txt\.gz, which is {kind};"):
        read(tmp_path / "b.txt.gz", utf8=utf8)


def test_text_of_every_kind_is_as_it_was(tmp_path):
    for text in ("one\r\ntwo\r\n", "\ufeffmark", " ", "BZh and PK", "é" * 3, "x" * 5_000_000):
        (tmp_path / "a").write_bytes(text.encode())
        assert read(tmp_path / "a", utf8=True)[0] == [text]


def test_lines_of_every_kind_are_read(tmp_path):
    path = tmp_path / "a.NDJSON"
    lines = ['\ufeff{"text": "first"}', '{"text": "\\u0000\\r"}', "", '{"text": "é"}', ""]
    path.write_bytes("\r\n".join(lines).encode())
    assert read(path)[0] == ["first", "\0\r", "é"]
    path.write_text('{"text": "' + "x" * 5_000_000 + '"}')  # and no line end
    assert [len(text) for text in read(path, size=10_000)[0]] == [5_000_000]
    for encoding in ("utf-16", "utf-16-be", "latin-1"):
        path.write_bytes('{"text": "first é"}\n{"text": "b"}\n'.encode(encoding))
        with pytest.raises(RunError, match=r"a\.NDJSON:1: expected a line of JSON, got b'"):
            read(path)


def test_a_file_that_vanishes_is_named(tmp_path):
    paths = [write_jsonl(tmp_path / "a.jsonl"), write_parquet(tmp_path / "b.parquet")]
    (tmp_path / "c.txt").write_text("text")
    for path in (*paths, tmp_path / "c.txt"):
        found = find_files(TextFiles(files=(str(path),)))
        pieces = list(cut_files(found, size=WHOLE))
        path.unlink()
        for late in (
            lambda found=found: list(cut_files(found, size=WHOLE)),
            lambda pieces=pieces: list(read_documents(pieces[0], "text")),
        ):
            with pytest.raises(RunError, match=rf"readable files, got {path}: .*No such file"):
                late()


def test_a_column_is_one_and_text(tmp_path):
    table = pa.table([["a"], ["b"]], names=["text", "text"])
    pq.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(RunError, match=r"data\.field: expected one 'text' in .*twice\.parquet"):
        read(tmp_path / "twice.parquet")
    path = write_parquet(tmp_path / "a.parquet", [b"a", b"b", b"c\xff"])
    assert read(path)[0] == ["a", "b", "c\udcff"]
    with pytest.raises(RunError, match=r"expected UTF-8 .*a\.parquet in row 2: .* at byte 1"):
        read(path, utf8=True)


@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz"])
def test_damage_of_any_kind_is_one_line(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        write_parquet(path)
    else:
        path.write_bytes(gzip.compress(write_jsonl(tmp_path / "b.jsonl").read_bytes()))
    data = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.choice([len(data), rng.randrange(len(data))])])
        with contextlib.suppress(RunError):
            read(path)
            continue
        refused += 1
        with pytest.raises(RunError, match=re.escape(str(path))) as error:
            read(path)
        assert "\n" not in str(error.value)
    assert refused > 75
