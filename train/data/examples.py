"""Documents as tokens, with what of them is learned: all of a text, the answers of a record."""

import json
from collections.abc import Iterator, Sequence

import numpy as np

from mdn_jax.errors import RunError
from mdn_jax.text.chat import ChatTemplate, Stretch, find_template
from mdn_jax.text.records import Fields
from mdn_jax.text.text import Text, text_of
from mdn_jax.text.tokenizer import BYTES, FileTokenizer, Tokenizer
from train.config_sections import DataConfig
from train.data.documents import Encoder, Example, texts_encoder


def fields_of(config: DataConfig) -> Fields:
    """The fields that are a document."""
    return Fields(config.field, config.prompt, config.messages)


def make_encoder(config: DataConfig, tokenizer: Tokenizer) -> Encoder:
    """How the documents of a source become tokens.

    Raises:
      RunError: chats without a template.
    """
    if config.messages is not None:
        return _Records(tokenizer, chat_template(config, tokenizer))
    return texts_encoder(tokenizer) if config.prompt is None else _Records(tokenizer, None)


def chat_template(config: DataConfig, tokenizer: Tokenizer) -> ChatTemplate:
    """The template of a configuration.

    Raises:
      RunError: there is none.
    """
    beside = config.tokenizer if isinstance(tokenizer, FileTokenizer) else None
    return find_template(config.chat_template, None if beside == BYTES else beside)


class _Records:
    """The encoder of records with parts: `Fields.document` has made JSON of them."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self._text: Text = text_of(tokenizer)
        self._template = template
        self._opening = self._text.encode("")
        self._closing = list(self._text.end_tokens[:1])  # so that the model learns to end
        self._special: tuple[str, ...] = ()
        if isinstance(tokenizer, FileTokenizer):
            self._special = tuple(x.content for x in tokenizer.vocabulary.special.values())

    def __call__(self, texts: Sequence[bytes]) -> Iterator[Example]:
        for text in texts:
            example = self._example(json.loads(text))
            if example.learned is not None and example.learned[1:].any():
                yield example

    def _example(self, record: dict[str, object]) -> Example:
        if self._template is None:
            parts = [
                Stretch(str(record["prompt"]), False),
                Stretch(str(record["completion"]), True),
            ]
            stretches = [(self._text.continuation(x.text), x.learned) for x in parts]
            stretches.append((self._closing, True))
        else:
            messages: list[dict[str, str]] = record["messages"]  # type: ignore[assignment]
            self._check(messages)
            parts = self._template.stretches(messages)
            # the template writes the tokens around a message by their names
            stretches = [(self._text.continuation(x.text, special=True), x.learned) for x in parts]
        if stretches[0][0][: len(self._opening)] != self._opening:
            stretches.insert(0, (self._opening, False))
        tokens = np.concatenate([np.array(ids, np.uint32) for ids, _ in stretches])
        learned = np.concatenate([np.full(len(ids), is_learned) for ids, is_learned in stretches])
        return Example(tokens, sum(len(x.text.encode()) for x in parts if x.learned), learned)

    def _check(self, messages: Sequence[dict[str, str]]) -> None:
        """Raises where a message would be read as the tokens around messages."""
        for message in messages:
            forged = next((x for x in self._special if x in message["content"]), None)
            if forged is not None:
                raise RunError(
                    f"data.messages: expected messages without special tokens, got {forged!r} in "
                    f"{message['content']!r:.80}"
                )
