"""Text to tokens and back."""

import sys
import types
from pathlib import Path

import pytest

from mdn_jax import MDNConfig
from train.errors import RunError
from train.saved_model import Saved
from train.text import ByteText, FileText, load_text


class FakeTokenizer:
    """Two bytes a token, or one that no second one follows; as `tokenizers.Tokenizer`."""

    @classmethod
    def from_file(cls, path):
        if Path(path).read_text() != "{}":
            raise Exception("not a tokenizer")
        return cls()

    def no_truncation(self):
        pass

    def no_padding(self):
        pass

    def get_vocab_size(self):
        return 65536

    def encode(self, text, add_special_tokens=True):
        data = text.encode()
        ids = [int.from_bytes(data[i : i + 2]) for i in range(0, len(data), 2)]
        return types.SimpleNamespace(ids=ids)

    def decode(self, ids):
        pairs = (x.to_bytes(2).lstrip(b"\0") for x in ids)
        return b"".join(pairs).decode(errors="replace")


@pytest.fixture
def file(tmp_path, monkeypatch):
    module = types.SimpleNamespace(Tokenizer=FakeTokenizer, ByteLevelBPETokenizer=None)
    monkeypatch.setitem(sys.modules, "tokenizers", module)
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path / "tokenizer.json"


def test_incomplete_characters_wait():
    decoder = ByteText().decoder()
    text = "aé€🙂z"
    pieces = [decoder.add([byte]) for byte in text.encode()]
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "🙂", "z"]
    assert decoder.finish() == ""
    assert decoder.add([0xE2, 0x82]) == ""
    assert decoder.finish() == "\ufffd"
    assert ByteText().decoder().add([0xFF, 65]) == "\ufffdA"


def test_bytes_that_are_no_text_survive_the_way_in():
    text = bytes([65, 255, 66]).decode(errors="surrogateescape")
    assert ByteText().encode(text) == [256, 65, 255, 66]
    assert ByteText().pair("é", "x") == ([256, 195, 169, 120], 3)


def test_a_tokenizer_file(file):
    text = FileText(file)
    assert text.vocab_limit == 65536
    whole = "abcd €🙂 and more, é"
    tokens = text.encode(whole)
    decoder = text.decoder()
    pieces = [decoder.add([token]) for token in tokens] + [decoder.finish()]
    assert "".join(pieces) == whole
    assert "" in pieces[:-1]
    assert not any("\ufffd" in piece for piece in pieces)
    assert text.bytes_of_first(tokens) == 2
    # the blank before a word belongs to it
    assert text.pair("ab ", "c") == (text.encode("ab c"), 1)


def saved(vocab_size, dtype):
    return Saved(Path(), 0, MDNConfig(vocab_size=vocab_size), dtype)


def test_which_tokens_a_checkpoint_has(file, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    assert isinstance(load_text(None, file.parent, saved(300, None)), FileText)
    assert isinstance(load_text(file, elsewhere, saved(300, None)), FileText)
    assert isinstance(load_text("bytes", file.parent, saved(300, None)), ByteText)
    assert isinstance(load_text(None, elsewhere, saved(300, "float32")), ByteText)
    assert isinstance(load_text(None, elsewhere, saved(257, None)), ByteText)
    with pytest.raises(RunError, match=r"tokenizer: expected a tokenizer.json.* has 200 tokens"):
        load_text(None, elsewhere, saved(200, "float32"))
    with pytest.raises(RunError, match=r"tokenizer: expected a tokenizer.json for the 300 tokens"):
        load_text(None, elsewhere, saved(300, None))


def test_a_bad_tokenizer_file(file, monkeypatch):
    file.write_text("[]")
    with pytest.raises(
        RunError, match=r"tokenizer: expected a tokenizer.json, or .*, got .*: not a tok"
    ):
        FileText(file)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(RunError, match="needs the tokenizers library: pip install"):
        FileText(file)
