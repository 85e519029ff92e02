"""Chats as text by the Jinja template that a tokenizer comes with."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mdn_jax.errors import RunError
from mdn_jax.extras import install
from mdn_jax.text.records import ASSISTANT

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"


class Stretch(NamedTuple):
    """A stretch of a conversation.

    Attributes:
      text: of it.
      learned: whether it is the assistant's.
    """

    text: str
    learned: bool


class ChatTemplate:
    """A template in Jinja's sandbox, as the transformers library runs it.

    Attributes:
      source: of the template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        """Compiles a template.

        Args:
          source: of the template.
          tokens: names of special tokens that it may ask for: `bos_token`, `eos_token`, ...

        Raises:
          RunError: no template, or no library to run it.
        """
        try:
            from jinja2.exceptions import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise RunError(
                f"data.messages: templates need the package jinja2: {install('huggingface')}"
            ) from None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
        self.source, self._tokens, self._error = source, dict(tokens or {}), TemplateError
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise RunError(
                f"data.chat_template: expected a Jinja template, got one with an error: {error}"
            ) from None

    def render(self, messages: Sequence[Mapping[str, Any]], *, prompts: bool = False) -> str:
        """The text of a conversation.

        Args:
          messages: with `role` and `content`.
          prompts: whether it ends where the assistant's next message begins.

        Raises:
          RunError: messages that the template does not take.
        """
        try:
            text: str = self._template.render(
                messages=messages, add_generation_prompt=prompts, **self._tokens
            )
        except (self._error, TypeError, ValueError) as error:
            raise RunError(
                f"data.messages: expected messages that the template takes, got "
                f"{json.dumps(messages, ensure_ascii=False):.80}: {error}"
            ) from None
        return text

    def stretches(self, messages: Sequence[Mapping[str, Any]]) -> list[Stretch]:
        """The text of a conversation up to the assistant's last message, cut by who speaks.

        Raises:
          RunError: messages that the template does not take, or a template whose text of a
            conversation does not begin with that of its beginning.
        """
        found: list[Stretch] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self.render(messages[:i], prompts=True)
            after = self.render(messages[: i + 1])
            if not (before.startswith(done) and after.startswith(before)):
                raise RunError(
                    "data.chat_template: expected a template whose text of a conversation begins "
                    "with that of its beginning, so that what the assistant says can be told "
                    f"apart, got another at {json.dumps(message, ensure_ascii=False):.80}"
                )
            found += [Stretch(before[len(done) :], False), Stretch(after[len(before) :], True)]
            done = after
        return [stretch for stretch in found if stretch.text]


def find_template(choice: str | None, tokenizer: str | None) -> ChatTemplate:
    """The template of a file, or that beside a tokenizer.

    Args:
      choice: a file with a template; None: `chat_template.jinja` or `tokenizer_config.json` beside
        the tokenizer.
      tokenizer: a `tokenizer.json` or a directory; None: there is none.

    Raises:
      RunError: none, or one that cannot be used.
    """
    directory = None
    if tokenizer is not None:
        place = Path(tokenizer).expanduser()
        directory = place if place.is_dir() else place.parent
    values = _read_config(directory)
    tokens = {name: _token(values[name]) for name in ("bos_token", "eos_token") if values.get(name)}
    path = None if choice is None else Path(choice).expanduser()
    if path is None and directory is not None and (directory / TEMPLATE_FILE).exists():
        path = directory / TEMPLATE_FILE
    if path is not None:
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), tokens)
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(
                f"data.chat_template: expected a file with a template, got {path}: {error}"
            ) from None
    template = values.get("chat_template")
    if isinstance(template, list):  # several by their names
        named = {x.get("name"): x.get("template") for x in template if isinstance(x, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise RunError(
            f"data.chat_template: expected a file with a Jinja template, as there is no "
            f"{TEMPLATE_FILE} and no chat_template in {CONFIG_FILE} beside the tokenizer "
            f"({tokenizer or 'bytes'}), got none"
        )
    return ChatTemplate(template, tokens)


def _read_config(directory: Path | None) -> dict[str, Any]:
    path = None if directory is None else directory / CONFIG_FILE
    if path is None or not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"data.chat_template: expected JSON in {path}, got: {error}") from None
    return values if isinstance(values, dict) else {}


def _token(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise ValueError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
