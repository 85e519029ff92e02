"""Multiple-choice questions, answered by the likelihood of each choice."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mdn_jax.errors import RunError
from mdn_jax.evaluation.token_losses import Row, row_after, token_losses, width_of
from mdn_jax.models import MDNForCausalLM
from mdn_jax.text.text import Text


class Question(NamedTuple):
    """A question.

    Attributes:
      context: what stands before every choice.
      choices: at least two.
      answer: index of the right one.
      place: what the question is in an error.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    place: str = "question"


class Answer(NamedTuple):
    """What the model makes of a question.

    Attributes:
      log_likelihoods: of the choices after the context, nats.
      likeliest: index of the highest.
      likeliest_by_length: index of the highest per byte of the choice.
    """

    log_likelihoods: tuple[float, ...]
    likeliest: int
    likeliest_by_length: int


def read_questions(path: Path) -> list[Question]:
    """Reads a JSONL file: one object a line with `context` or `question`, `choices`, `answer`.

    Other fields are ignored, as are empty lines. The place of a question is its file and line.

    Raises:
      RunError: a line that does not fit, by its number.
    """
    questions = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: expected a readable UTF-8 file: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                question = _question(json.loads(line))
            except ValueError as error:
                raise RunError(f"{path}:{number}: {error}") from None
            except RecursionError:
                raise RunError(f"{path}:{number}: expected less deeply nested JSON") from None
            questions.append(question._replace(place=f"{path}:{number}"))
    if not questions:
        raise RunError(f"{path}: expected at least one question, got none")
    return questions


def _question(values: Any) -> Question:
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {type(values).__name__}")
    names = [name for name in ("context", "question") if name in values]
    if len(names) != 1:
        raise ValueError(f"context, question: expected one of the two, got {names or 'neither'}")
    context, choices, answer = values[names[0]], values.get("choices"), values.get("answer")
    if not isinstance(context, str):
        raise ValueError(f"{names[0]}: expected a string, got {context!r}")
    if not _is_unicode(context):
        raise ValueError(f"{names[0]}: expected Unicode text, got lone surrogates in {context!r}")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise ValueError(f"choices: expected two or more strings, none empty, got {choices!r}")
    if not all(map(_is_unicode, choices)):
        raise ValueError(f"choices: expected Unicode text, got lone surrogates in {choices!r}")
    last = len(choices) - 1
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer <= last:
        raise ValueError(f"answer: expected an int from 0 to {last}, got {answer!r}")
    return Question(context, tuple(choices), answer)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def answer_questions(
    model: MDNForCausalLM,
    text: Text,
    questions: Sequence[Question],
    *,
    separator: str,
    batch_size: int,
) -> Iterator[Answer]:
    """Scores every choice after its context.

    The choices of a question are scored from the same place (`Text.pairs`), so that none gains by
    a token that spans the end of the context.

    Args:
      model: the model.
      text: its tokens.
      questions: what to answer.
      separator: between context and choice; its likelihood counts, its length does not.
      batch_size: choices in one call.

    Yields:
      An answer to every question, in their order.

    Raises:
      RunError: a choice that has nothing to score or no finite likelihood, by its question.
    """
    rows = [row for question in questions for row in _rows(text, question, separator)]
    losses = token_losses(model, rows, batch_size=batch_size, width=width_of(rows))
    for question in questions:
        scores = [-float(np.sum(next(losses), dtype=np.float64)) for _ in question.choices]
        by_length = [
            score / len(choice.encode(errors="surrogateescape"))
            for score, choice in zip(scores, question.choices, strict=True)
        ]
        yield Answer(tuple(scores), int(np.argmax(scores)), int(np.argmax(by_length)))


def _rows(text: Text, question: Question, separator: str) -> list[Row]:
    try:
        pairs = text.pairs(question.context, [separator + x for x in question.choices])
    except RunError as error:
        raise RunError(f"{question.place}: {error}") from None
    return [
        row_after(tokens, context, f"{question.place}: choices[{i}]")
        for i, (tokens, context) in enumerate(pairs)
    ]
