"""Text to tokens and back."""

import hashlib
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mdn_jax import MDNConfig
from mdn_jax.errors import RunError
from mdn_jax.saved.model import Saved
from mdn_jax.saved.tokens import load_text
from mdn_jax.text.text import ByteText, FileText


def merging(path, words, merges=(), **parts):
    """A tokenizer.json of characters and the words that merges make of them."""
    ids = words if isinstance(words, dict) else {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(ids, list(merges)))
    tokenizer.decoder = decoders.Fuse()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.save(str(path))
    return path


@pytest.fixture
def file(tmp_path):
    """The characters of "How: ?xy!" and "ow", ": ", ": x", "y!", and nothing that opens a text."""
    words = [*"How: ?xy!", "ow", ": ", ": x", "y!"]
    merges = [("o", "w"), (":", " "), (": ", "x"), ("y", "!")]
    return merging(tmp_path / "tokenizer.json", words, merges)


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
    assert ByteText().document(text) == [256, 65, 255, 66]
    assert ByteText().pairs("é", ["x"]) == [([256, 195, 169, 120], 3)]
    with pytest.raises(RunError, match=r"text: expected Unicode text, got lone surrogates in"):
        ByteText().encode("a\ud83d")


def test_all_choices_are_scored_from_where_the_tokens_part(file):
    text = FileText(file)
    x, y = text.pairs("How:", [" x", " y"])
    assert (x.tokens, x.context) == (text.encode("How: x"), 2)
    assert (y.tokens, y.context) == (text.encode("How: y"), 2)
    assert len(x.tokens) == 3  # H, ow, ": x"
    # alone, the second choice parts from the context one token later
    assert text.pairs("How:", ["?"])[0].context == 3
    assert [pair.context for pair in text.pairs("How:", ["?", " x"])] == [2, 2]
    # the blank before a word belongs to it
    assert text.pairs("How: ", ["x"]) == [x]


def test_tokens_without_one_in_common_are_those_of_each_part(file):
    text = FileText(file)
    o, w, y, exclamation = (text.encode(character)[0] for character in "owy!")
    assert text.encode("ow") not in ([o], [w])
    assert text.pairs("o", ["w"]) == [([o, w], 1)]
    assert text.pairs("y", ["!", "w"]) == [([y, exclamation], 1), ([y, w], 1)]
    with pytest.raises(RunError, match=r"context: expected text, as no token .* opens .*, got ''"):
        text.pairs("", ["How"])


def test_text_behind_what_is_not_known_where_the_usual_word_is_none(tmp_path):
    ids = {"<unk>": 0} | {f"<0x{i:02X}>": i + 1 for i in range(256)} | {"▁x": 300, "▁yz": 301}
    strip = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    merging(tmp_path / "t.json", ids, decoder=strip)
    text = FileText(tmp_path / "t.json")
    assert text.decoder().add([301, 300]) == " yz x"
    assert text.decoder([]).add([301, 300]) == "yz x"
    assert text.decoder([300, 1 + 0xC3, 1 + 0xA9]).add([301, 7000]) == " yz"


def test_a_continuation_without_a_token(tmp_path):
    words = {"How": 0, "so": 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="so"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "words.json"))
    own = r"continuation: expected text with a token of its own after the context, got "
    for text, odd in ((FileText(tmp_path / "words.json"), "  "), (ByteText(), "")):
        with pytest.raises(RunError, match=f"{own}'{odd}'"):
            text.pairs("How", ["so", odd])
        with pytest.raises(RunError, match=f"{own}''"):
            text.pairs("How ", [""])


def saved(vocab_size, dtype, **published):
    config = MDNConfig.from_dict({"vocab_size": vocab_size, **published})
    return Saved(Path(), 0, config, dtype)


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


def test_the_tokenizer_of_a_checkpoint_is_the_one_it_was_written_with(file, tmp_path):
    copy = tmp_path / "run" / "tokenizer.json"
    copy.parent.mkdir()
    data = file.read_bytes()
    copy.write_bytes(data)
    known = saved(300, "float32")._replace(tokenizer=hashlib.sha256(data).hexdigest())
    assert isinstance(load_text(None, copy.parent, known), FileText)
    copy.write_bytes(data.replace(b'"y!"', b'"x!"'))  # still a tokenizer
    words = rf"^tokenizer: expected the tokenizer.json of the checkpoint in {copy} .*, got "
    with pytest.raises(RunError, match=words + r"another \("):
        load_text(None, copy.parent, known)
    assert isinstance(load_text(file, copy.parent, known), FileText)
    copy.unlink()  # and no text of bytes in its place
    with pytest.raises(RunError, match=words + "none"):
        load_text(None, copy.parent, known)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    words = {"a": 0, "b": 2, "</s>": 41}
    merging(directory / "tokenizer.json", words)
    text = load_text(None, directory, saved(42, None))
    assert (text.vocab_size, text.vocab_limit, text.end_tokens) == (42, 42, (41,))
    assert load_text(None, directory, saved(64, None)).vocab_limit == 42  # more is padding
    for size in (41, 3):
        expected = f"tokenizer: expected ids below the {size} of .*run, got ids up to 41 in .*json"
        with pytest.raises(RunError, match=expected):
            load_text(None, directory, saved(size, "float32"))
    ends = load_text(None, directory, saved(64, None, eos_token_id=2)).end_tokens
    assert ends == (2, 41)  # what the published configuration says comes first
    with pytest.raises(RunError, match="eos_token_id: expected an id below 64, got 64"):
        load_text(None, directory, saved(64, None, eos_token_id=64))


def test_a_bad_tokenizer_file(tmp_path, monkeypatch):
    file = tmp_path / "tokenizer.json"
    for content in ("[]", "{}", "", '{"model": null}'):
        file.write_text(content)
        with pytest.raises(RunError, match=r"tokenizer: expected a tokenizer.json, or .*, got .*"):
            FileText(file)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(RunError, match="needs the tokenizers library: install mdn-jax with"):
        FileText(file)
