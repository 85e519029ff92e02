"""Stop strings, tokens' names, chats: what needs no model."""

import random

import pytest

from mdn_jax.serving.errors import RequestError
from mdn_jax.serving.texts import Answer, Texts
from mdn_jax.text.text import ByteText

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


def test_a_chat_without_a_template_is_refused():
    with pytest.raises(RequestError, match="no chat template") as caught:
        TEXTS.chat([{"role": "user", "content": "x"}])
    assert caught.value.body()["error"]["param"] == "messages"
