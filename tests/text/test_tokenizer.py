"""Tokenizers of training: what opens a document, what makes two of them the same."""

import json
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mdn_jax.errors import RunError
from mdn_jax.text.text import FileText
from mdn_jax.text.tokenizer import BYTES, ByteTokenizer, FileTokenizer, make_tokenizer
from tests.text.helpers import TEXTS, write_bpe


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return write_bpe(tmp_path_factory.mktemp("bpe"))


def words(path, names, **changes):
    """A tokenizer.json of whole words that opens documents with nothing."""
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=names[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_bytes():
    tokenizer = make_tokenizer(None, None)
    assert tokenizer.vocab_size == 257
    assert tokenizer.fingerprint == make_tokenizer(BYTES, None).fingerprint == BYTES
    (tokens,) = tokenizer.encode_documents(["é\n".encode()])
    assert tokens.tolist() == [256, 0xC3, 0xA9, 10]
    with pytest.raises(RunError, match=r"data\.start_token: expected None.*got '<s>'"):
        make_tokenizer(None, "<s>")


def test_gpt2_files_open_documents_with_end_of_text(bpe):
    tokenizer = FileTokenizer(bpe)
    assert tokenizer.vocab_size == 300
    texts = [*TEXTS, "\n  naïve →", ""]
    for tokens, text in zip(
        tokenizer.encode_documents([t.encode() for t in texts]), texts, strict=True
    ):
        assert tokens[0] == 0
        assert 0 not in tokens[1:]
        assert tokens.max() < 300
        assert tokenizer.bytes_of_first(tokens) == 0
        assert tokenizer.library.decode(tokens.tolist()) == text


def test_the_saved_tokenizer_is_the_same(bpe, tmp_path):
    tokenizer = FileTokenizer(bpe)
    tokenizer.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        saved = FileTokenizer(path)
        assert saved.fingerprint == tokenizer.fingerprint
        (ours,), (theirs,) = (t.encode_documents([b"word1 word2"]) for t in (saved, tokenizer))
        np.testing.assert_array_equal(ours, theirs)
    text = FileText(tmp_path / "tokenizer.json")  # as mdn-generate and mdn-eval read it
    assert text.encode("word1 word2") == ours.tolist()
    assert text.encode("") == [0]
    ByteTokenizer().save(tmp_path / "nowhere")  # there is no file for bytes


def test_the_start_token(tmp_path):
    path = words(tmp_path / "tokenizer.json", ["?", "a", "b", "[S]"])
    plain = FileTokenizer(path)
    assert [x.tolist() for x in plain.encode_documents([b"a b", b""])] == [[1, 2], []]
    assert plain.bytes_of_first(plain.encode_documents([b"a b"])[0]) == 1
    opening = FileTokenizer(path, start_token="[S]")
    assert [x.tolist() for x in opening.encode_documents([b"a b", b""])] == [[3, 1, 2], [3]]
    assert opening.fingerprint != plain.fingerprint
    (tmp_path / "saved").mkdir()
    opening.save(tmp_path / "saved")
    for start in (None, "[S]"):  # not twice
        again = FileTokenizer(tmp_path / "saved", start_token=start)
        assert again.encode_documents([b"a"])[0].tolist() == [3, 1]
        assert again.fingerprint == opening.fingerprint
    with pytest.raises(RunError, match=r"data\.start_token: expected a token of .*, got '\[T\]'"):
        FileTokenizer(path, start_token="[T]")


def test_fingerprints_tell_tokenizers_apart(tmp_path, bpe):
    def fingerprint(name, *arguments, **changes):
        return FileTokenizer(words(tmp_path / name, *arguments, **changes)).fingerprint

    first = fingerprint("a.json", ["?", "a", "b"])
    assert fingerprint("b.json", ["?", "a", "b"]) == first
    others = {
        fingerprint("c.json", ["?", "b", "a"]),
        fingerprint("d.json", ["?", "a", "b", "c"]),
        fingerprint("e.json", ["?", "a", "b"], normalizer={"type": "Prepend", "prepend": "a "}),
        FileTokenizer(bpe).fingerprint,
    }
    assert len(others | {first}) == 5


def test_other_merges_of_the_same_vocabulary_are_another_tokenizer(bpe, tmp_path):
    merges = (bpe / "merges.txt").read_text().splitlines()
    (tmp_path / "vocab.json").write_text((bpe / "vocab.json").read_text())
    (tmp_path / "merges.txt").write_text("\n".join([merges[0], *reversed(merges[1:])]))
    other = FileTokenizer(tmp_path)
    assert other.vocab_size == 300
    assert other.fingerprint != FileTokenizer(bpe).fingerprint


def test_nothing_is_truncated_or_padded(tmp_path):
    truncation = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    padding = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "?",
    }
    path = words(tmp_path / "a.json", ["?", "a", "b"], truncation=truncation, padding=padding)
    (tokens,) = FileTokenizer(path).encode_documents([b"a b a b a"])
    assert tokens.tolist() == [1, 2, 1, 2, 1]
    assert FileText(path).encode("a b a b a") == [1, 2, 1, 2, 1]


def test_text_that_is_not_utf8_is_refused(bpe):
    with pytest.raises(RunError, match=r"data\.tokenizer: expected UTF-8 text .*b'good \\xff'"):
        FileTokenizer(bpe).encode_documents([b"good", b"good \xff"])


def test_files_that_cannot_be_used_are_named(bpe, tmp_path, monkeypatch):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(
            RunError, match=r"tokenizer: expected a tokenizer\.json, or a directory"
        ):
            FileTokenizer(path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(RunError, match=r"expected a tokenizer\.json.*got .*: \w+"):
        FileTokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(RunError, match="needs the tokenizers library: install mdn-jax with"):
        FileTokenizer(bpe)
