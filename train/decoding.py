"""Text from tokens as they come: joined, it is that of all tokens decoded at once."""

import codecs
from collections.abc import Sequence
from typing import Protocol, override

from train.vocabulary import Vocabulary

_OPEN = 4  # tokens that may hold an incomplete character, which has 4 bytes at most


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
        self._keep(self._last_of(before))

    @override
    def add(self, tokens: Sequence[int]) -> str:
        is_visible, is_byte = self._vocabulary.is_visible, self._vocabulary.is_byte
        self._waiting += [token for token in tokens if is_visible(token)]
        certain = len(self._waiting)
        while certain and is_byte(self._waiting[certain - 1]):
            certain -= 1
        for stop in range(certain, max(0, certain - _OPEN), -1):
            new = self._new(stop)
            if not new.endswith("\ufffd"):
                return self._show(stop, new)
        return ""

    @override
    def finish(self) -> str:
        return self._show(len(self._waiting), self._new(len(self._waiting)))

    def _last_of(self, before: Sequence[int] | None) -> list[int]:
        """The last token before that says what it does to the text behind it."""
        visible = [token for token in before or () if self._vocabulary.is_visible(token)]
        for token in reversed(visible):
            if not self._vocabulary.is_byte(token) and self._vocabulary.decode([token]):
                return [token]
        return self._vocabulary.word if visible or before is None else []

    def _new(self, stop: int) -> str:
        """The text of the first tokens that wait."""
        return self._vocabulary.decode(self._shown + self._waiting[:stop])[len(self._text) :]

    def _show(self, stop: int, new: str) -> str:
        shown, self._waiting = self._waiting[:stop], self._waiting[stop:]
        before = self._shown
        self._keep(shown)
        if not self._text:  # a lone blank, it may be: to what follows it would be no text at all
            self._keep(before + shown)
        return new

    def _keep(self, shown: list[int]) -> None:
        self._shown, self._text = shown, self._vocabulary.decode(shown)
