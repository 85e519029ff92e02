"""Shards are the documents they were made of; damage, gaps and other tokenizers are refused."""

import errno
import os

import numpy as np
import pytest

from tests.train.data.helpers import TEXTS, write_bpe, write_jsonl
from train.data.corpus import load_corpus
from train.data.documents import tokenize, tokens_of
from train.data.files import find_files
from train.data.packing import PackedRows
from train.data.shards import open_shards, read_header, shard_name, write_shard
from train.data.tokenizing import write_shards
from train.errors import RunError
from train.sections import DataConfig
from train.tokenizer import ByteTokenizer, make_tokenizer


def make(directory, texts, shards=3, tokenizer=None):
    directory.mkdir(exist_ok=True)
    texts = [text.encode() for text in texts]
    paths = [directory / shard_name(i, shards) for i in range(shards)]
    tokenizer = tokenizer or ByteTokenizer()
    for i, path in enumerate(paths):
        part = texts[i * len(texts) // shards : (i + 1) * len(texts) // shards]
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

    (path,) = make(tmp_path, ["abc", "de"], shards=1, tokenizer=Wide())
    assert read_header(path).dtype == "uint32"
    train, held_out, _ = opened([path], Wide())
    assert sorted(contents(train) + contents(held_out))[0] == [69_256, 69_097, 69_098, 69_099]


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
    with pytest.raises(RunError, match=r"expected a shard of mdn-tokenize, got .*00000.*is none"):
        opened(paths)
    paths[0].write_bytes(data[:20] + b"{" + data[21:])
    with pytest.raises(RunError, match=r"got .*00000.*: its header is damaged"):
        opened(paths)
    paths[0].unlink()
    paths[0].mkdir()
    with pytest.raises(RunError, match=r"expected readable shards, got .*00000.*Is a directory"):
        opened(paths)


def test_a_missing_shard_is_noticed(tmp_path):
    paths = make(tmp_path, TEXTS)
    with pytest.raises(RunError, match=r"expected all of the 3 shards of .*, got 2; run mdn-tok"):
        opened(paths[:2])


def test_shards_of_another_tokenizer_are_refused(tmp_path):
    bpe = make_tokenizer(str(write_bpe(tmp_path / "bpe")), None)
    with pytest.raises(RunError, match=r"data\.tokenizer: expected that of .*00000.* 257 tokens"):
        opened(make(tmp_path / "bytes", TEXTS), bpe)
    with pytest.raises(RunError, match=r"data\.tokenizer: expected .*, got bytes with 257"):
        opened(make(tmp_path / "s", TEXTS, tokenizer=bpe))


def test_one_document_is_cut_and_none_refused(tmp_path):
    text = "0123456789" * 10
    train, held_out, _ = opened(make(tmp_path / "one", [text], shards=1), fraction=0.1)
    ours = contents(train)[0] + contents(held_out)[0]
    assert ours == [256, *text.encode()]
    assert len(contents(held_out)[0]) == 10
    assert train.size.sum() + held_out.size.sum() == 100
    with pytest.raises(RunError, match=r"expected shards with documents, got 2 without any"):
        opened(make(tmp_path / "none", [], shards=2))


def test_a_shard_that_fails_leaves_none(tmp_path):
    def failing():
        yield from tokens_of([b"a"], ByteTokenizer())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RunError, match=r"output: expected to write .*, got: No space left on dev"):
        write_shard(tmp_path / shard_name(0, 1), failing(), ByteTokenizer(), "source")
    assert not list(tmp_path.iterdir())
