"""Text from tokens as they come: joined, it is that of all tokens decoded at once."""

import codecs
from collections.abc import Sequence
from typing import Protocol, override

from mdn_jax.text.vocabulary import Vocabulary

_OPEN = 4  # tokens that may hold an incomplete character, which has 4 bytes at most
_BLANKS = 64  # tokens without a text by themselves to decode behind


class Decoder(Protocol):
    """Text from tokens as they come."""

    def add(self, tokens: Sequence[int]) -> str:
        """The text that has become certain; the rest of an incomplete character waits."""

    def finish(self) -> str:
        """What still waits; an incomplete character shows as U+FFFD."""


class ByteDecoder(Decoder):
    """Text of bytes; other ids have none."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @override
    def add(self, tokens: Sequence[int]) -> str:
        return self._decoder.decode(bytes(token for token in tokens if token < 256))

    @override
    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class FileDecoder(Decoder):
    """Text of the tokens of a vocabulary.

    What a token's text is depends on its place: the first of a text may lose a blank, bytes that
    are no UTF-8 change those beside them. So tokens are decoded behind some that have been shown,
    less the text of those, and wait while more tokens could change theirs.
    """

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int] | None) -> None:
        """Begins a text, or goes on with one.

        Args:
          vocabulary: of the tokens.
          before: tokens of what has been shown; None: there is something, of unknown tokens.
        """
        self._vocabulary = vocabulary
        self._waiting: list[int] = []
        self._shown: list[int] = []
        self._text = ""  # of `_shown`
        if not self._stand_behind(before or ()):
            unknown = before is None or not vocabulary.visible.isdisjoint(before)
            self._stand_behind(vocabulary.word if unknown else ())

    @override
    def add(self, tokens: Sequence[int]) -> str:
        visible, parts = self._vocabulary.visible, self._vocabulary.bytes
        self._waiting += [token for token in tokens if token in visible]
        certain = len(self._waiting)
        while certain and self._waiting[certain - 1] in parts:
            certain -= 1
        for stop in range(certain, max(0, certain - _OPEN), -1):
            new = self._new(stop)
            if not new.endswith("\ufffd"):
                return self._show(stop, new)
        return ""

    @override
    def finish(self) -> str:
        return self._show(len(self._waiting), self._new(len(self._waiting)))

    def _new(self, stop: int) -> str:
        """The text of the first tokens that wait."""
        return self._vocabulary.decode(self._shown + self._waiting[:stop])[len(self._text) :]

    def _show(self, stop: int, new: str) -> str:
        shown, self._waiting = self._waiting[:stop], self._waiting[stop:]
        if not self._stand_behind(shown):  # lone blanks, it may be
            self._shown = (self._shown + shown)[-_BLANKS:]
            self._text = self._vocabulary.decode(self._shown)
        return new

    def _stand_behind(self, tokens: Sequence[int]) -> bool:
        """Decodes what follows behind the last of the tokens that has a text by itself, if any."""
        visible, parts = self._vocabulary.visible, self._vocabulary.bytes
        for token in reversed(tokens):
            if token in visible and token not in parts:
                text = self._vocabulary.decode([token])
                if text:
                    self._shown, self._text = [token], text
                    return True
        return False
