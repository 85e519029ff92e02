"""What a server does with text: prompts to tokens, chats by their template, answers piece by piece.

Nothing here touches the model.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from mdn_jax.errors import RunError
from mdn_jax.serving.errors import RequestError
from mdn_jax.text.chat import ChatTemplate
from mdn_jax.text.decoding import Decoder
from mdn_jax.text.text import Text


class Step(NamedTuple):
    """One token of an answer or a prompt, with its place in the text.

    Attributes:
      token: its id.
      logprob: of it, in nats; None: nothing predicted it.
      top: the likeliest ids there with their log-probabilities, the likeliest first.
      offset: characters of text before it.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]]
    offset: int


class Texts:
    """The tokens of a model's text, and its chat template if there is one.

    Attributes:
      text: to token ids and back.
    """

    def __init__(self, text: Text, template: ChatTemplate | None = None) -> None:
        self.text, self._template = text, template
        self.name_of = lru_cache(maxsize=1 << 16)(self._name_of)

    def prompt(self, text: str) -> list[int]:
        """Token ids of a prompt; special tokens that it spells are those tokens.

        Raises:
          RequestError: text without a token.
        """
        return self._encoded("prompt", self.text.encode(text, special=True))

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the assistant answers, as training reads it.

        Raises:
          RequestError: no template, or messages that it does not take.
        """
        if self._template is None:
            raise RequestError(
                400,
                "messages: expected a prompt for /v1/completions, as there is no chat template "
                "beside the model's tokenizer, got messages",
                field="messages",
            )
        try:
            rendered = self._template.render(messages, prompts=True)
        except RunError as error:
            message = str(error).removeprefix("data.")
            raise RequestError(400, message, field="messages") from None
        tokens = self.text.continuation(rendered, special=True)
        return self._encoded("messages", self.opened(tokens))

    def opened(self, tokens: list[int]) -> list[int]:
        """The tokens with those before them that open a document, unless they are there."""
        opening = self.text.encode("")
        return tokens if tokens[: len(opening)] == opening else opening + tokens

    def _encoded(self, field: str, tokens: list[int]) -> list[int]:
        if not tokens:
            message = f"{field}: expected text with at least one token, got none"
            raise RequestError(400, message, field=field)
        return tokens

    def steps(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None] | None = None,
        tops: Sequence[list[tuple[int, float]]] | None = None,
    ) -> tuple[str, list[Step]]:
        """The text of a prompt's tokens, and each of them with its place in it."""
        decoder, text, steps = self.text.decoder([]), "", []
        for i, token in enumerate(tokens):
            logprob, top = logprobs[i] if logprobs else None, tops[i] if tops else []
            steps.append(Step(token, logprob, top, len(text)))
            text += decoder.add([token])
        return text + decoder.finish(), steps

    def _name_of(self, token: int) -> str:
        """A token as text of its own; `token_id:N` where it has none, or a part of a character."""
        special = self.text.spelled(token)
        if special is not None:
            return special
        decoder = self.text.decoder()
        name = decoder.add([token]) + decoder.finish()
        return f"token_id:{token}" if not name or "\ufffd" in name else name


class Answer:
    """The text of an answer as its tokens come: up to the first stop string, which is not shown.

    What may be the beginning of a stop string waits.

    Args:
      decoder: of the tokens.
      stops: strings that end it.
      detailed: whether `steps` are kept.

    Attributes:
      shown: characters that `add` and `finish` have returned.
      tokens: how many tokens it has, up to the one that ended it.
      stopped: whether a stop string came.
      steps: of its tokens, which whoever shows them removes.
    """

    def __init__(self, decoder: Decoder, stops: Sequence[str], *, detailed: bool) -> None:
        self._decoder, self._stops, self._detailed = decoder, tuple(stops), detailed
        self._waiting = ""
        self.shown, self.tokens, self.stopped = 0, 0, False
        self.steps: list[Step] = []

    def add(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None] | None = None,
        tops: Sequence[list[tuple[int, float]]] | None = None,
    ) -> str:
        """The text that has become certain; after a stop string there is no more."""
        if not self._stops and not self._detailed:
            self.tokens += len(tokens)
            return self._show(self._decoder.add(tokens))
        text = ""
        for i, token in enumerate(tokens):
            if self.stopped:
                break
            self.tokens += 1
            if self._detailed:
                logprob = None if logprobs is None else logprobs[i]
                offset = self.shown + len(self._waiting)
                self.steps.append(Step(token, logprob, tops[i] if tops else [], offset))
            text += self._show(self._decoder.add([token]))
        return text

    def finish(self) -> str:
        """What still waits."""
        if self.stopped:
            return ""
        text = self._show(self._decoder.finish())
        if not self.stopped:
            text += self._waiting
            self.shown += len(self._waiting)
            self._waiting = ""
        return text

    def _show(self, new: str) -> str:
        text = self._waiting + new
        ends = [i for stop in self._stops if (i := text.find(stop)) >= 0]
        if ends:
            self.stopped, end = True, min(ends)
            self.steps = [step for step in self.steps if step.offset < self.shown + end]
            self._waiting = ""
        else:
            end = len(text) - self._open(text)
            self._waiting = text[end:]
        self.shown += end
        return text[:end]

    def _open(self, text: str) -> int:
        """Characters at the end that may begin a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for count in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stops):
                return count
        return 0
