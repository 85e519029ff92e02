"""Shards are the documents they were made of; damage, gaps and other tokenizers are refused."""

import dataclasses
import errno
import json
import os
import tracemalloc

import numpy as np
import pytest

from mdn_jax.errors import RunError
from mdn_jax.text.corpus import load_corpus
from mdn_jax.text.files import find_files
from mdn_jax.text.tokenizer import ByteTokenizer, make_tokenizer
from tests.text.helpers import TEXTS, write_bpe, write_jsonl
from train.config_sections import DataConfig
from train.data import shards
from train.data.documents import tokenize, tokens_of
from train.data.packing import PackedRows
from train.data.shards import open_shards, read_header, shard_name, write_shard
from train.data.tokenizing import write_shards


def make(directory, texts, count=3, tokenizer=None):
    directory.mkdir(exist_ok=True)
    texts = [text.encode() for text in texts]
    paths = [directory / shard_name(i, count) for i in range(count)]
    tokenizer = tokenizer or ByteTokenizer()
    for i, path in enumerate(paths):
        part = texts[i * len(texts) // count : (i + 1) * len(texts) // count]
        write_shard(path, tokens_of(part, tokenizer), tokenizer, "source")
    return paths


def opened(paths, tokenizer=None, *, fraction=0.2, verify=True):
    tokenizer = tokenizer or ByteTokenizer()
    return open_shards(paths, tokenizer, held_out_fraction=fraction, verify=verify)


def contents(documents):
    return [documents.read(i, 0, int(documents.length[i])).tolist() for i in range(len(documents))]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_shards_are_the_documents_in_memory(tmp_path, kind):
    name = None if kind == "bytes" else str(write_bpe(tmp_path / "bpe"))
    tokenizer = make_tokenizer(name, None)
    config = DataConfig(
        files=(str(write_jsonl(tmp_path / "a.jsonl")),), tokenizer=name, held_out_fraction=0.2
    )
    corpus = load_corpus(config)
    expected = [tokenize(texts, tokenizer) for texts in (corpus.train, corpus.held_out)]
    written = write_shards(config, tmp_path / "shards", shard_bytes=500, processes=1)
    assert len(written.headers) > 3
    paths = [p for p, _ in find_files(DataConfig(files=(str(tmp_path / "shards"),)))]
    *actual, digest = opened(paths, tokenizer)
    for ours, theirs in zip(actual, expected, strict=True):
        assert contents(ours) == contents(theirs)
        np.testing.assert_array_equal(ours.size, theirs.size)
    batches = [
        PackedRows(x, batch_size=4, sequence_length=8, seed=3).batch(5)
        for x in (actual[0], expected[0])
    ]
    for key in batches[0]:
        np.testing.assert_array_equal(batches[0][key], batches[1][key])
    again = write_shards(config, tmp_path / "again", shard_bytes=500, processes=1)
    assert again.headers == written.headers
    assert opened(sorted((tmp_path / "again").glob("*.tokens")), tokenizer)[2] == digest


def test_the_text_behind_the_tokens_is_counted(tmp_path):
    tokenizer = make_tokenizer(str(write_bpe(tmp_path / "bpe")), None)
    train, held_out, _ = opened(make(tmp_path / "s", TEXTS, tokenizer=tokenizer), tokenizer)
    assert train.size.sum() + held_out.size.sum() == sum(len(text) for text in TEXTS)
    assert held_out.bytes_per_target > 1.2
    texts = [b"ab ab", b"x"]
    assert tokenize(texts, ByteTokenizer()).bytes_per_target == 1


def test_a_wide_vocabulary_has_wide_tokens(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size = 70_000

        def encode_documents(self, texts):
            return [tokens + np.uint32(69_000) for tokens in super().encode_documents(texts)]

    (path,) = make(tmp_path, ["abc", "de"], count=1, tokenizer=Wide())
    assert read_header(path).dtype == "uint32"
    train, held_out, _ = opened([path], Wide())
    assert sorted(contents(train) + contents(held_out))[0] == [69_256, 69_097, 69_098, 69_099]


def parts_of(path):
    """A shard's header, tokens and table."""
    header, data = read_header(path), path.read_bytes()[4096:]
    tokens = np.frombuffer(data, header.dtype, header.tokens).copy()
    return header, tokens, np.frombuffer(data[header.tokens_bytes :], "<u8").reshape(-1, 3).copy()


def write_parts(path, header, tokens, table):
    """A shard with a right digest, whatever is in it."""
    rest = tokens.tobytes().ljust(header.tokens_bytes, b"\0") + table.tobytes()
    digest = header.digest()
    digest.update(rest)
    values = dataclasses.asdict(header) | {"sha256": digest.hexdigest()}
    path.write_bytes(b"MDNTOK01" + json.dumps(values).encode().ljust(4088) + rest)


@pytest.mark.parametrize("place", [100, 4096, 4500, -30, -1])
def test_one_changed_byte_is_noticed(tmp_path, place):
    paths = make(tmp_path, TEXTS)
    opened(paths)
    data = bytearray(paths[1].read_bytes())
    data[place] ^= 1
    paths[1].write_bytes(data)
    with pytest.raises(RunError, match=r"data\.files: expected .*, got .*00001-of-00003\.tokens"):
        opened(paths)


def test_the_digest_can_be_left_unchecked(tmp_path):
    paths = make(tmp_path, TEXTS)
    data = bytearray(paths[1].read_bytes())
    data[4096] ^= 1
    paths[1].write_bytes(data)
    opened(paths, verify=False)
    with pytest.raises(RunError, match=r"expected a shard with the SHA-256 of its header"):
        opened(paths)


@pytest.mark.parametrize("left", [-1, 5000, 4096])
def test_a_truncated_shard_is_named_with_its_size(tmp_path, left):
    paths = make(tmp_path, TEXTS)
    paths[2].write_bytes(paths[2].read_bytes()[:left])
    with pytest.raises(RunError, match=r"expected an intact shard of [\d,]+ bytes, got .*00002"):
        opened(paths, verify=False)


def test_what_is_no_shard_is_named(tmp_path):
    paths = make(tmp_path, TEXTS)
    data = paths[0].read_bytes()
    paths[0].write_bytes(b"something else")
    with pytest.raises(RunError, match=r"expected a shard of tokens, got .*00000.*is none"):
        opened(paths)
    paths[0].write_bytes(data[:20] + b"{" + data[21:])
    with pytest.raises(RunError, match=r"got .*00000.*: its header is damaged"):
        opened(paths)
    paths[0].unlink()
    paths[0].mkdir()
    with pytest.raises(RunError, match=r"expected readable shards, got .*00000.*Is a directory"):
        opened(paths)


HEADERS = [
    ({"tokens": 1 << 40}, r"an intact shard of 2,199,\d+,\d+,\d+ bytes, got"),
    ({"tokens": 1 << 60}, r"header is damaged: tokens: expected an int >= 0, got 1152"),
    ({"documents": 1 << 40}, r"an intact shard of 26,\d+,\d+,\d+,\d+ bytes, got"),
    ({"documents": -3}, r"header is damaged: documents: expected an int >= 0, got -3"),
    ({"tokens": 7.0}, r"header is damaged: tokens: expected an int >= 0, got 7\.0"),
    ({"tokens": True}, r"header is damaged: tokens: expected an int >= 0, got True"),
    ({"vocab_size": "257"}, r"header is damaged: vocab_size: expected an int >= 1, got '257'"),
    ({"vocab_size": 0}, r"header is damaged: vocab_size: expected an int >= 1, got 0"),
    ({"dtype": "V9999999999"}, r"header is damaged: dtype: expected one of .*, got 'V999"),
    ({"dtype": ["uint16"]}, r"header is damaged: dtype: expected one of"),
    ({"tokenizer": None}, r"header is damaged: tokenizer: expected a string, got None"),
    ({"sha256": "zz" * 32}, r"header is damaged: sha256: expected 64 digits, got 'zzzz"),
    ({"sha256": ""}, r"header is damaged: sha256: expected 64 digits, got ''"),
    ({"sha256": "ab" * 32}, r"expected a shard with the SHA-256 of its header \(ababababab"),
    ({"more": 1}, r"header is damaged: .*more"),
    ([1, 2], r"header is damaged"),
    ("[" * 4000, r"header is damaged"),
    ('{"tokens": ' * 360, r"header is damaged"),
    ("", r"header is damaged"),
]


@pytest.mark.parametrize(("changed", "message"), HEADERS)
def test_a_header_that_lies_is_refused_before_anything_is_read(tmp_path, changed, message):
    paths = make(tmp_path, TEXTS)
    data = paths[1].read_bytes()
    text = changed
    if not isinstance(changed, str):
        old = json.loads(data[8:4096])
        text = json.dumps(old | changed if isinstance(changed, dict) else changed)
    paths[1].write_bytes(data[:8] + text.encode().ljust(4088) + data[4096:])
    tracemalloc.start()
    with pytest.raises(RunError, match=message) as error:
        opened(paths)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert "00001-of-00003.tokens" in str(error.value)
    assert "\n" not in str(error.value)


TABLES = [
    ((2, 0), 1 << 40, r"document 2 from token \d+ to 1,099,511,627,776 "),
    ((-1, 0), 1 << 63, r"document \d+ from token \d+ to 9,223,372,036,854,775,808 "),
    ((3, 0), 1, r"document 3 from token \d+ to 1 "),
    ((0, 0), 0, r"document 0 from token 0 to 0 "),
    ((4, 1), (1 << 64) - 2, r"document 4 from .* with 18,446,744,073,709,551,614 bytes"),
]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("place", "value", "message"), TABLES)
def test_a_table_that_lies_is_refused(tmp_path, place, value, message, verify):
    paths = make(tmp_path, TEXTS)
    header, tokens, table = parts_of(paths[2])
    write_parts(paths[2], header, tokens, table)
    opened(paths)  # as it was
    table[place] = value
    write_parts(paths[2], header, tokens, table)
    with pytest.raises(RunError, match=rf"got .*00002.*: its table of \d+ tokens has {message}"):
        opened(paths, verify=verify)


def test_a_table_that_ends_early_is_refused(tmp_path):
    paths = make(tmp_path, TEXTS)
    header, tokens, table = parts_of(paths[0])
    header = dataclasses.replace(header, documents=len(table) - 1)
    write_parts(paths[0], header, tokens, table[:-1])
    with pytest.raises(RunError, match=r"got .*00000.*: its table .* has an end at token \d+; del"):
        opened(paths)


@pytest.mark.parametrize("kind", ["uint16", "uint32"])
@pytest.mark.parametrize("place", [0, 9, -1])
def test_tokens_beyond_the_vocabulary_are_refused(tmp_path, monkeypatch, kind, place):
    monkeypatch.setattr(shards, "_BLOCK", 64)
    paths = make(tmp_path, TEXTS, count=1)
    header, tokens, table = parts_of(paths[0])
    header, tokens = dataclasses.replace(header, dtype=kind), tokens.astype(kind)
    write_parts(paths[0], header, tokens, table)
    train, held_out, _ = opened(paths)
    assert sum(map(len, contents(train) + contents(held_out))) == len(tokens)
    tokens[place] = 257
    write_parts(paths[0], header, tokens, table)
    with pytest.raises(RunError, match=r"tokens below the 257 .* got 257 in .*00000-of-00001"):
        opened(paths)


@pytest.mark.parametrize("size", [0, 5, 4000])
def test_an_empty_shard_is_named(tmp_path, size):
    paths = make(tmp_path, TEXTS)
    paths[1].write_bytes(paths[1].read_bytes()[:size])
    with pytest.raises(RunError, match=r"data\.files: expected .*, got .*00001-of-00003\.tokens"):
        opened(paths)


def test_a_missing_shard_is_noticed(tmp_path):
    paths = make(tmp_path, TEXTS)
    with pytest.raises(
        RunError, match=r"expected all of the 3 shards of .*, got 2; run `python -m train tok"
    ):
        opened(paths[:2])
    beyond = paths[2].rename(tmp_path / "00007-of-00003.tokens")
    with pytest.raises(RunError, match=r"expected all of the 3 shards of .*, got 3; run `python"):
        opened([*paths[:2], beyond])
    many = paths[0].rename(tmp_path / f"00000-of-{10**17}.tokens")
    with pytest.raises(RunError, match=rf"expected all of the {10**17} shards of .*, got 1; run"):
        opened([many])


def test_shards_of_another_tokenizer_are_refused(tmp_path):
    bpe = make_tokenizer(str(write_bpe(tmp_path / "bpe")), None)
    with pytest.raises(RunError, match=r"data\.tokenizer: expected that of .*00000.* 257 tokens"):
        opened(make(tmp_path / "bytes", TEXTS), bpe)
    with pytest.raises(RunError, match=r"data\.tokenizer: expected .*, got bytes with 257"):
        opened(make(tmp_path / "s", TEXTS, tokenizer=bpe))


def test_one_document_is_cut_and_none_refused(tmp_path):
    text = "0123456789" * 10
    train, held_out, _ = opened(make(tmp_path / "one", [text], count=1), fraction=0.1)
    ours = contents(train)[0] + contents(held_out)[0]
    assert ours == [256, *text.encode()]
    assert len(contents(held_out)[0]) == 10
    assert train.size.sum() + held_out.size.sum() == 100
    with pytest.raises(RunError, match=r"expected shards with documents, got 2 without any"):
        opened(make(tmp_path / "none", [], count=2))


def test_a_shard_that_fails_leaves_none(tmp_path):
    def failing():
        yield from tokens_of([b"a"], ByteTokenizer())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RunError, match=r"output: expected to write .*, got: No space left on dev"):
        write_shard(tmp_path / shard_name(0, 1), failing(), ByteTokenizer(), "source")
    assert not list(tmp_path.iterdir())


def test_what_was_left_unfinished_is_removed_and_nothing_else(tmp_path):
    source = DataConfig(files=(str(write_jsonl(tmp_path / "a.jsonl")),))
    output = tmp_path / "out"
    output.mkdir()
    left = {"00001-of-00007.123.tmp": False, "notes.tmp": True, "00001.tmp": True}
    for name in left:
        (output / name).write_text("x")
    write_shards(source, output, shard_bytes=500, processes=1)
    assert {name: (output / name).exists() for name in left} == left


def test_a_first_token_within_a_character_has_its_own_bytes(tmp_path):
    class Halves(ByteTokenizer):
        def bytes_of_first(self, tokens):
            return 3  # a replacement character

    (path,) = make(tmp_path, ["é", "four"], count=1, tokenizer=Halves())
    train, held_out, _ = opened([path], Halves())
    sizes = sorted([*train.size, *held_out.size])
    assert sizes == sorted(tokenize(["é".encode(), b"four"], Halves()).size) == [0, 1]
