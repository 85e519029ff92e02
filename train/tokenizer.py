"""Byte-level tokens: ids 0 to 255 are the bytes, 256 opens a document."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

DOCUMENT_START = 256
VOCAB_SIZE = 257


def encode(text: bytes) -> NDArray[np.uint16]:
    """Token ids of one document: `DOCUMENT_START`, then its bytes; `[1 + len(text)]`."""
    tokens = np.empty(len(text) + 1, np.uint16)
    tokens[0] = DOCUMENT_START
    tokens[1:] = np.frombuffer(text, np.uint8)
    return tokens


def decode(tokens: Iterable[int]) -> str:
    """Text of token ids; ids above 255 are left out, malformed UTF-8 shows as U+FFFD."""
    return bytes(token for token in map(int, tokens) if token < 256).decode(errors="replace")
