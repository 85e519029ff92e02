"""Which fields of a record are a document: a text, a prompt with a completion, or a chat.

The last two are kept as JSON in one form, so that they are documents of bytes as texts are: with a
digest, on one side of the split, once however many copies there are.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

ASSISTANT = "assistant"


class Fields(NamedTuple):
    """The fields of a record that are a document.

    Attributes:
      text: of a text; with `prompt` of the completion.
      prompt: of the text before the completion; None: there is none.
      messages: of a chat, a list of objects with `role` and `content`; None: the record is none.
    """

    text: str = "text"
    prompt: str | None = None
    messages: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of these fields."""
        if self.messages is not None:
            return (self.messages,)
        return (self.text,) if self.prompt is None else (self.prompt, self.text)

    @property
    def are_parts(self) -> bool:
        """Whether a document has parts that are learned and parts that are not."""
        return self.prompt is not None or self.messages is not None

    def document(self, record: Mapping[str, Any]) -> bytes:
        """The document of a record that has these fields; empty: there is nothing to learn.

        Raises:
          ValueError: a value of another kind, by the name of its field.
        """
        if self.messages is not None:
            return _chat(self.messages, record[self.messages])
        for name in self.names:
            if not isinstance(record[name], str):
                raise ValueError(f"{name}: expected a string, got {type(record[name]).__name__}")
        if self.prompt is None:
            return _encoded(self.text, record[self.text])
        if not record[self.text]:
            return b""
        parts = {"prompt": record[self.prompt], "completion": record[self.text]}
        return _encoded(self.text, json.dumps(parts, ensure_ascii=False))


def _chat(name: str, messages: Any) -> bytes:
    if not isinstance(messages, list):
        raise ValueError(f"{name}: expected a list of messages, got {type(messages).__name__}")
    kept = []
    for i, message in enumerate(messages):
        fits = isinstance(message, Mapping) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not fits:
            raise ValueError(
                f"{name}[{i}]: expected an object with the strings role and content, got "
                f"{message!r:.80}"
            )
        # Parquet has every field in every message
        kept.append({key: value for key, value in message.items() if value is not None})
    if not any(message["role"] == ASSISTANT and message["content"] for message in kept):
        return b""
    return _encoded(name, json.dumps({"messages": kept}, ensure_ascii=False))


def _encoded(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected text, got half of a surrogate pair: {error}") from None
