"""Text to token ids and back: bytes, or a `tokenizer.json`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, override

from mdn_jax.errors import RunError
from mdn_jax.text.decoding import ByteDecoder, Decoder, FileDecoder
from mdn_jax.text.tokenizer import DOCUMENT_START, VOCAB_SIZE, FileTokenizer, Tokenizer, encode
from mdn_jax.text.vocabulary import Vocabulary, not_text


class Pair(NamedTuple):
    """Tokens of a context and its continuation.

    Attributes:
      tokens: of both.
      context: how many of them come before what is to be scored; at least 1, and not all.
    """

    tokens: list[int]
    context: int


class Text(Protocol):
    """Token ids of text.

    Attributes:
      vocab_size: ids are below it.
      vocab_limit: ids from here on are no text.
      end_tokens: ids after which nothing belongs to a text.
    """

    vocab_size: int
    vocab_limit: int
    end_tokens: tuple[int, ...]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Tokens of the start of a document.

        Args:
          text: any.
          special: whether special tokens that it spells are those tokens; else they are text.

        Raises:
          RunError: text that these tokens cannot be of.
        """

    def continuation(self, text: str, *, special: bool = False) -> list[int]:
        """Tokens of text that others came before; arguments as of `encode`."""

    def document(self, text: str) -> list[int]:
        """Tokens of a whole document, with what the tokenizer closes it with."""

    def pairs(self, context: str, continuations: Sequence[str]) -> list[Pair]:
        """Tokens of a document's start with each of several texts after it.

        All are scored from the same place: behind the tokens that the context alone and every
        whole have in common. A token that spans the end of the context is so scored with all of
        them, or with none. If nothing is in common, context and continuation are tokenised each by
        itself.

        Raises:
          RunError: a continuation without a token of its own, or with nothing before it.
        """

    def bytes_of_first(self, tokens: list[int]) -> int:
        """Bytes of text in a document's first token, which nothing predicts."""

    def spelled(self, token: int) -> str | None:
        """How a text spells a special token; None: it has none, or the token is not special."""

    def decoder(self, before: Sequence[int] | None = None) -> Decoder:
        """A decoder of its own for one row.

        Args:
          before: tokens of what has been shown; None: there is something, of unknown tokens.
        """


class ByteText(Text):
    """A document is a start token and its UTF-8 bytes."""

    vocab_size: int = VOCAB_SIZE
    vocab_limit: int = DOCUMENT_START
    end_tokens: tuple[int, ...] = ()

    @override
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return encode(_bytes(text)).tolist()

    @override
    def continuation(self, text: str, *, special: bool = False) -> list[int]:
        return list(_bytes(text))

    @override
    def document(self, text: str) -> list[int]:
        return self.encode(text)

    @override
    def pairs(self, context: str, continuations: Sequence[str]) -> list[Pair]:
        first = self.encode(context)
        for continuation in continuations:
            if not continuation:
                raise _without_token(continuation)
        return [Pair(first + self.continuation(text), len(first)) for text in continuations]

    @override
    def bytes_of_first(self, tokens: list[int]) -> int:
        return 0

    @override
    def spelled(self, token: int) -> str | None:
        return None

    @override
    def decoder(self, before: Sequence[int] | None = None) -> Decoder:
        return ByteDecoder()


class FileText(Text):
    """The tokens of a `tokenizer.json`, by the tokenizers library."""

    def __init__(self, source: Path | FileTokenizer, *, end_token: int | None = None) -> None:
        """Reads the tokenizer, unless that is done.

        Args:
          source: a `tokenizer.json`, or what training read.
          end_token: ends a text, beside the tokenizer's own end tokens.

        Raises:
          RunError: a file that cannot be used.
        """
        if isinstance(source, FileTokenizer):
            self._vocabulary = source.vocabulary
        else:
            self._vocabulary = Vocabulary(source)
        self.vocab_size = self.vocab_limit = self._vocabulary.size
        named = () if end_token is None else (end_token,)
        self.end_tokens = tuple(dict.fromkeys(named + self._vocabulary.end_tokens))

    @override
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return [*self._vocabulary.opening, *self._vocabulary.encode(text, special=special)]

    @override
    def continuation(self, text: str, *, special: bool = False) -> list[int]:
        return self._vocabulary.encode(text, special=special)

    @override
    def document(self, text: str) -> list[int]:
        return [*self.encode(text), *self._vocabulary.closing]

    @override
    def pairs(self, context: str, continuations: Sequence[str]) -> list[Pair]:
        blank = len(context) - len(context.rstrip())  # belongs to the word that follows
        end = len(context) - blank
        before = self.encode(context[:end])
        wholes = [self.encode(context + text) for text in continuations]
        common = [_common(before, whole) for whole in wholes]
        for text, whole, same in zip(continuations, wholes, common, strict=True):
            if not text or same == len(whole):
                raise _without_token(text)
        if min(common):
            return [Pair(whole, min(common)) for whole in wholes]
        if not before:
            raise RunError(
                "context: expected text, as no token of the tokenizer opens a document, got "
                f"{context!r}"
            )
        own = [self.continuation(context[end:] + text) for text in continuations]
        for text, tokens in zip(continuations, own, strict=True):
            if not tokens:
                raise _without_token(text)
        return [Pair(before + tokens, len(before)) for tokens in own]

    @override
    def bytes_of_first(self, tokens: list[int]) -> int:
        return len(self._vocabulary.decode(tokens[:1]).encode())

    @override
    def spelled(self, token: int) -> str | None:
        special = self._vocabulary.special.get(token)
        return None if special is None else str(special.content)

    @override
    def decoder(self, before: Sequence[int] | None = None) -> Decoder:
        return FileDecoder(self._vocabulary, before)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _without_token(text: str) -> RunError:
    return RunError(
        f"continuation: expected text with a token of its own after the context, got {text!r}"
    )


def _bytes(text: str) -> bytes:
    """UTF-8, and bytes that were none as they were."""
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError as error:
        raise not_text(error, "Unicode text") from None


def text_of(tokenizer: Tokenizer) -> Text:
    """The tokens of a run."""
    return FileText(tokenizer) if isinstance(tokenizer, FileTokenizer) else ByteText()
