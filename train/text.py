"""Text to token ids and back: bytes, or a `tokenizer.json`."""

import codecs
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, override

from train.errors import RunError
from train.saved_model import Saved
from train.tokenizer import (
    DOCUMENT_START,
    TOKENIZER_FILE,
    VOCAB_SIZE,
    FileTokenizer,
    Tokenizer,
    encode,
    read_tokenizer,
)


class Pair(NamedTuple):
    """Tokens of a context and its continuation.

    Attributes:
      tokens: of both.
      context: how many of them are the context's.
    """

    tokens: list[int]
    context: int


class Decoder(Protocol):
    """Text from tokens as they come."""

    def add(self, tokens: list[int]) -> str:
        """The text that has become certain; the rest of an incomplete character waits."""

    def finish(self) -> str:
        """What still waits; an incomplete character shows as U+FFFD."""


class Text(Protocol):
    """Token ids of text.

    Attributes:
      vocab_limit: ids from here on are no text; None: the whole vocabulary is.
    """

    vocab_limit: int | None

    def encode(self, text: str) -> list[int]:
        """Tokens of the start of a document."""

    def continuation(self, text: str) -> list[int]:
        """Tokens of text that others came before."""

    def pair(self, context: str, continuation: str) -> Pair:
        """Tokens of a document's start and of what follows it."""

    def bytes_of_first(self, tokens: list[int]) -> int:
        """Bytes of text in a document's first token, which nothing predicts."""

    def decoder(self) -> Decoder:
        """A decoder of its own for one row."""


class ByteText(Text):
    """A document is a start token and its UTF-8 bytes."""

    vocab_limit: int | None = DOCUMENT_START

    @override
    def encode(self, text: str) -> list[int]:
        return encode(text.encode(errors="surrogateescape")).tolist()

    @override
    def continuation(self, text: str) -> list[int]:
        return list(text.encode(errors="surrogateescape"))

    @override
    def pair(self, context: str, continuation: str) -> Pair:
        first = self.encode(context)
        return Pair(first + self.continuation(continuation), len(first))

    @override
    def bytes_of_first(self, tokens: list[int]) -> int:
        return 0

    @override
    def decoder(self) -> Decoder:
        return _ByteDecoder()


class _ByteDecoder(Decoder):
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @override
    def add(self, tokens: list[int]) -> str:
        return self._decoder.decode(bytes(token for token in tokens if token < 256))

    @override
    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class FileText(Text):
    """The tokens of a `tokenizer.json`, by the tokenizers library."""

    def __init__(self, source: Path | FileTokenizer) -> None:
        """Reads the tokenizer, unless that is done.

        Args:
          source: a `tokenizer.json`, or what training read.

        Raises:
          RunError: a file that cannot be used.
        """
        if isinstance(source, FileTokenizer):
            self._tokenizer = source.library
        else:
            self._tokenizer = read_tokenizer(source)
        self.vocab_limit = self._tokenizer.get_vocab_size()

    @override
    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    @override
    def continuation(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @override
    def pair(self, context: str, continuation: str) -> Pair:
        blank = len(context) - len(context.rstrip())  # belongs to the word that follows
        if blank:
            context, continuation = context[:-blank], context[-blank:] + continuation
        return Pair(self.encode(context + continuation), len(self.encode(context)))

    @override
    def bytes_of_first(self, tokens: list[int]) -> int:
        return len(self._tokenizer.decode(tokens[:1]).encode())

    @override
    def decoder(self) -> Decoder:
        return _FileDecoder(self._tokenizer)


class _FileDecoder(Decoder):
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []  # the last ones only: what a token's text may depend on
        self._waiting: list[int] = []

    @override
    def add(self, tokens: list[int]) -> str:
        self._waiting += tokens
        new = self._new()
        return "" if new.endswith("\ufffd") else self._show(new)

    @override
    def finish(self) -> str:
        return self._show(self._new())

    def _new(self) -> str:
        shown: str = self._tokenizer.decode(self._shown)
        text: str = self._tokenizer.decode(self._shown + self._waiting)
        return text[len(shown) :]

    def _show(self, new: str) -> str:
        self._shown, self._waiting = (self._shown + self._waiting)[-4:], []
        return new


def text_of(tokenizer: Tokenizer) -> Text:
    """The tokens of a run."""
    return FileText(tokenizer) if isinstance(tokenizer, FileTokenizer) else ByteText()


def load_text(choice: Path | Literal["bytes"] | None, directory: Path, saved: Saved) -> Text:
    """The tokens of a checkpoint.

    Args:
      choice: a `tokenizer.json`, "bytes", or None: the file in `directory` if there is one, else
        bytes.
      directory: of the checkpoint.
      saved: the checkpoint.

    Raises:
      RunError: a file that cannot be used, or no way to tell what the tokens are.
    """
    beside = directory / TOKENIZER_FILE
    if choice is None and beside.exists():
        choice = beside
    if choice is not None and str(choice) != "bytes":
        return FileText(Path(choice))
    size = saved.model.vocab_size
    if size < VOCAB_SIZE:
        raise RunError(
            f"tokenizer: expected a tokenizer.json, as the vocabulary of {directory} has {size} "
            f"tokens and that of bytes {VOCAB_SIZE}, got none"
        )
    if choice is None and saved.dtype is None and size != VOCAB_SIZE:
        raise RunError(
            f"tokenizer: expected a tokenizer.json for the {size} tokens of the converted model "
            f'in {directory} (or "bytes"), got none'
        )
    return ByteText()
