"""The fields of a request's body: each is read by one function, and an unknown one is refused."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from mdn_jax.serving.errors import RequestError, unfit

Reader = Callable[[str, Any], Any]
"""A field's value from its name and what came; raises RequestError where it does not fit."""


def read_fields(body: Any, readers: Mapping[str, Reader]) -> dict[str, Any]:
    """The fields of a body that are there and not null.

    Raises:
      RequestError: no object, an unknown field, or a value that does not fit.
    """
    if not isinstance(body, dict):
        raise RequestError(400, f"body: expected a JSON object, got {type(body).__name__}")
    for name in body:
        if name not in readers:
            raise unfit(str(name)[:80], f"one of the fields {', '.join(readers)}", body[name])
    return {name: readers[name](name, body[name]) for name in body if body[name] is not None}


def whole(least: int, most: int) -> Reader:
    """Reads an int."""

    def read(name: str, value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise unfit(name, f"an int from {least} to {most}", value)
        return value

    return read


def number(least: float, most: float, *, above: bool = False) -> Reader:
    """Reads a number; `above`: `least` itself does not fit."""

    def read(name: str, value: Any) -> float:
        fits = type(value) in (int, float) and math.isfinite(value) and least <= value <= most
        if not fits or (above and value == least):
            raise unfit(name, f"a number {'above' if above else 'from'} {least} to {most}", value)
        return float(value)

    return read


def flag(name: str, value: Any) -> bool:
    """Reads true or false."""
    if not isinstance(value, bool):
        raise unfit(name, "true or false", value)
    return value


def string(name: str, value: Any) -> str:
    """Reads a text, which has to be Unicode."""
    if not isinstance(value, str):
        raise unfit(name, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise unfit(name, "Unicode text without lone surrogates", value) from None
    return value


def one_of(*values: Any) -> Reader:
    """Reads one of some values: of a field that does nothing more here."""

    def read(name: str, value: Any) -> Any:
        if value not in values:
            expected = " or ".join(map(repr, values))
            raise unfit(name, f"{expected} (nothing else is supported)", value)
        return value

    return read


def anything(name: str, value: Any) -> Any:
    """Reads what has no effect on an answer."""
    return value
