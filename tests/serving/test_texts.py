"""Stop strings, tokens' names, chats: what needs no model."""

import random

import pytest

from mdn_jax.serving.errors import RequestError
from mdn_jax.serving.texts import Answer, Texts
from mdn_jax.text.chat import ChatTemplate
from mdn_jax.text.text import ByteText, FileText
from tests.text.helpers import write_bpe

TEXTS = Texts(ByteText())


def answer(*stops, detailed=False):
    return Answer(ByteText().decoder(), stops, detailed=detailed)


@pytest.mark.parametrize("seed", range(20))
def test_a_text_in_any_pieces_ends_before_its_first_stop(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(60))
    stops = tuple("".join(rng.choice("ab") for _ in range(rng.randint(2, 7))) for _ in range(4))
    ends = [i for stop in stops if (i := text.find(stop)) >= 0]
    for width in (1, 3, 60):
        growing, shown = answer(*stops), ""
        for start in range(0, len(text), width):
            shown += growing.add(list(text[start : start + width].encode()))
        shown += growing.finish()
        assert growing.stopped == bool(ends)
        first_over = min(
            (text.find(stop) + len(stop) for stop in stops if stop in text), default=60
        )
        whole = min(ends) if ends else 60
        # the stop that is complete first ends the text, and of those the one that begins first
        assert shown == text[: len(shown)]
        assert whole <= len(shown) < first_over or not ends
        assert not any(stop in shown for stop in stops)
        assert growing.tokens == (first_over if ends else 60)


def test_what_may_begin_a_stop_waits():
    growing = answer("\n\n")
    assert growing.add([ord("a"), ord("\n")]) == "a"
    assert growing.add([ord("b"), ord("\n")]) == "\nb"
    assert growing.finish() == "\n"


def test_steps_have_the_places_of_their_text():
    growing = answer("cd", detailed=True)
    tokens = "aéb".encode() + b"cde"
    assert growing.add(list(tokens), [-1.0] * 7, [[]] * 7) == "aéb"
    assert [step.offset for step in growing.steps] == [0, 1, 1, 2]
    assert growing.tokens == 6


def test_names_of_tokens():
    assert [TEXTS.name_of(x) for x in (97, 195, 256)] == ["a", "token_id:195", "token_id:256"]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A BPE of a few texts, with an end token."""
    return FileText(write_bpe(tmp_path_factory.mktemp("tokenizer")))


def test_stop_strings_of_merged_tokens(pieces):
    tokens = pieces.continuation("3: word7 word11 é word23")
    assert len(tokens) < 18  # some are longer than a character
    growing = Answer(pieces.decoder([]), ("11 é",), detailed=True)
    shown = "".join(growing.add([token], [-1.0], [[]]) for token in tokens)
    assert (shown + growing.finish(), growing.stopped) == ("3: word7 word", True)
    assert growing.tokens < len(tokens)
    assert all(step.offset < len(shown) for step in growing.steps)


def test_special_tokens_have_their_names_and_chats_may_spell_them(pieces):
    (end,) = pieces.end_tokens
    texts = Texts(pieces, ChatTemplate("{{ messages[0].content }}<|endoftext|>"))
    assert texts.name_of(end) == "<|endoftext|>"
    assert texts.prompt("word1<|endoftext|>")[-1] == end
    assert texts.chat([{"role": "user", "content": "word1"}])[-1] == end
    shown, steps = texts.steps(pieces.continuation("word1 word2"))
    assert shown == "word1 word2"
    assert "".join(texts.name_of(step.token) for step in steps) == shown
    with pytest.raises(RequestError, match="prompt: expected text with at least one token"):
        texts.prompt("")


def test_a_template_that_refuses(pieces):
    texts = Texts(pieces, ChatTemplate("{{ raise_exception('no system message') }}"))
    with pytest.raises(RequestError, match="messages: expected messages that the template takes"):
        texts.chat([{"role": "system", "content": "x"}])


def test_a_chat_without_a_template_is_refused():
    with pytest.raises(RequestError, match="no chat template") as caught:
        TEXTS.chat([{"role": "user", "content": "x"}])
    assert caught.value.body()["error"]["param"] == "messages"
