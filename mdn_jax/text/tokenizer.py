"""Tokens of training text: bytes, or what a `tokenizer.json` or a GPT-2 vocabulary says."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, override

import numpy as np
from numpy.typing import NDArray

from mdn_jax.errors import RunError
from mdn_jax.new_file import write_text
from mdn_jax.text.vocabulary import END_OF_TEXT, TOKENIZER_FILE, Vocabulary

DOCUMENT_START = 256
VOCAB_SIZE = 257
BYTES = "bytes"


class Tokenizer(Protocol):
    """Token ids of documents.

    Attributes:
      vocab_size: ids are below it.
      fingerprint: equal only for tokenizers that give the same ids.
    """

    vocab_size: int
    fingerprint: str

    def encode_documents(self, texts: Sequence[bytes]) -> list[NDArray[np.uint32]]:
        """Token ids of each of several documents.

        Raises:
          RunError: text that this tokenizer cannot take.
        """

    def bytes_of_first(self, tokens: NDArray[np.uint32]) -> int:
        """Bytes of text in a document's first token, which nothing predicts."""

    def save(self, directory: Path) -> None:
        """Writes the tokenizer for whoever reads the tokens later, where there is a file for it."""


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes, 256 opens a document."""

    vocab_size = VOCAB_SIZE
    fingerprint = BYTES

    @override
    def encode_documents(self, texts: Sequence[bytes]) -> list[NDArray[np.uint32]]:
        return [encode(text).astype(np.uint32) for text in texts]

    @override
    def bytes_of_first(self, tokens: NDArray[np.uint32]) -> int:
        return 0

    @override
    def save(self, directory: Path) -> None:
        pass


class FileTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library."""

    def __init__(self, path: Path, *, start_token: str | None = None) -> None:
        """Reads a tokenizer.

        Args:
          path: a `tokenizer.json`, or a directory with one, or with GPT-2's `vocab.json` and
            `merges.txt`.
          start_token: opens every document; None: what the tokenizer itself adds, or
            `<|endoftext|>` if it adds nothing and has that token.

        Raises:
          RunError: no such files, or a token that the vocabulary lacks.
        """
        self.vocabulary = Vocabulary(path)
        self.library = self.vocabulary.library
        self.vocab_size = self.vocabulary.size
        if start_token is None and not self.vocabulary.opening:
            # as in GPT-2's training
            start_token = END_OF_TEXT if END_OF_TEXT in self.vocabulary.ids else None
        if start_token is not None:
            if start_token not in self.vocabulary.ids:
                raise RunError(f"data.start_token: expected a token of {path}, got {start_token!r}")
            self.vocabulary.open_with(start_token)
        self.fingerprint = self._fingerprint(self.vocabulary.ids)

    def _fingerprint(self, vocabulary: dict[str, int]) -> str:
        """Of the vocabulary, its merges, and the tokens of a text with all of its words in it.

        And not of the file, which versions of the library write differently.
        """
        words = sorted(vocabulary.items(), key=lambda word: word[1])
        texts = self.library.decode_batch([[number] for _, number in words])
        ids = self.library.encode(" ".join(texts)).ids
        merges = json.loads(self.library.to_str())["model"].get("merges", [])
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        return hashlib.sha256(json.dumps([words, merges, ids]).encode()).hexdigest()

    @override
    def encode_documents(self, texts: Sequence[bytes]) -> list[NDArray[np.uint32]]:
        try:
            decoded = [text.decode() for text in texts]
        except UnicodeDecodeError as error:
            around = error.object[max(0, error.start - 20) : error.start + 20]
            raise RunError(
                "data.tokenizer: expected UTF-8 text for a tokenizer other than bytes, got "
                f"{around!r} in a document"
            ) from None
        encodings = self.library.encode_batch_fast(decoded)
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    @override
    def bytes_of_first(self, tokens: NDArray[np.uint32]) -> int:
        return len(self.vocabulary.decode(tokens[:1].tolist()).encode())

    @override
    def save(self, directory: Path) -> None:
        write_text(directory / TOKENIZER_FILE, self.library.to_str(pretty=True))


def make_tokenizer(choice: str | None, start_token: str | None) -> Tokenizer:
    """The tokenizer that a configuration names: "bytes" (or None), or a path.

    Raises:
      RunError: files that cannot be used.
    """
    if choice in (None, BYTES):
        if start_token is not None:
            raise RunError(
                f"data.start_token: expected None with the tokenizer of bytes, got {start_token!r}"
            )
        return ByteTokenizer()
    return FileTokenizer(Path(os.path.expanduser(str(choice))), start_token=start_token)


def encode(text: bytes) -> NDArray[np.uint16]:
    """Token ids of one document: `DOCUMENT_START`, then its bytes; `[1 + len(text)]`."""
    tokens = np.empty(len(text) + 1, np.uint16)
    tokens[0] = DOCUMENT_START
    tokens[1:] = np.frombuffer(text, np.uint8)
    return tokens


def decode(tokens: Iterable[int]) -> str:
    """Text of token ids; ids above 255 are left out, malformed UTF-8 shows as U+FFFD."""
    return bytes(token for token in map(int, tokens) if token < 256).decode(errors="replace")
