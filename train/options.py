"""What a field of the configuration says of itself, beside its type and its default.

Each field is declared in one place: what a run that resumes may do with it, and whether every
process has the same, is metadata of the field.
"""

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

_KEY = "option"


class Option(NamedTuple):
    """What a field says of itself.

    Attributes:
      resume: whether a run that resumes may change it, or has to have that of its checkpoint.
      processes: whether every process has the same, or its own.
    """

    resume: Literal["may change", "fixed"]
    processes: Literal["same", "own"] = "same"


def option(
    default: Any = dataclasses.MISSING,
    *,
    factory: Callable[[], Any] | Any = dataclasses.MISSING,
    resume: Literal["may change", "fixed"],
    processes: Literal["same", "own"] = "same",
) -> Any:
    """A field of a configuration.

    Args:
      default: of the field.
      factory: makes the default, in place of one.
      resume: "fixed" for all that the parameters or the order of the documents depend on.
      processes: "own" for what may differ between the processes of a run.
    """
    metadata = {_KEY: Option(resume, processes)}
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def options(section: type) -> dict[str, Option]:
    """Every field of a configuration and of its sections, by the name of its flag.

    A field that is a dataclass without metadata is a section; one with metadata (`model`) is a
    single field here, and stands for all within it.

    Raises:
      TypeError: a field without metadata that is no section.
    """
    return dict(_walk(section, ""))


def _walk(section: type, prefix: str) -> Iterator[tuple[str, Option]]:
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        name = f"{prefix}{field.name}"
        if _KEY in field.metadata:
            yield name, field.metadata[_KEY]
        elif dataclasses.is_dataclass(hints[field.name]):
            yield from _walk(hints[field.name], f"{name}.")
        else:
            raise TypeError(f"{name}: expected a field made by option(), got one without metadata")


def option_of(name: str, declared: Mapping[str, Option]) -> Option | None:
    """What a configuration says of a flag; None: there is no such field.

    Args:
      name: of the flag, with dots; it may lie within a field of `declared`.
      declared: from `options`.
    """
    while name not in declared and "." in name:
        name = name.rpartition(".")[0]
    return declared.get(name)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}} -> {"a.b": 1}`, the names that the flags have."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def build[C](kind: type[C], values: Any, prefix: str = "") -> C:
    """A configuration from JSON values, section by section; what is not there has its default.

    A section that has a `from_dict` of its own is built by that.

    Raises:
      ValueError: an unknown key, or a value that does not fit, by its name.
    """
    if not isinstance(values, Mapping):
        where = prefix.removesuffix(".") or "configuration"
        raise ValueError(f"{where}: expected a JSON object, got {values!r:.40}")
    hints = get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    parts: dict[str, Any] = {}
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"{prefix}{name}: expected one of {sorted(names)}, got an unknown key")
        section = hints[name]
        if hasattr(section, "from_dict"):
            try:
                parts[name] = section.from_dict(value)
            except ValueError as error:
                raise ValueError(f"{prefix}{name}.{error}") from None
        elif dataclasses.is_dataclass(section):
            parts[name] = build(section, value, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            parts[name] = _typed(section, value, f"{prefix}{name}")
    return kind(**parts)


def _typed(hint: Any, value: Any, name: str) -> Any:
    """A JSON value as one of the types that fields have.

    Raises:
      ValueError: of another type, by its name.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        for kind in arguments:
            try:
                return _typed(kind, value, name)
            except ValueError:
                continue
    elif origin is Literal:
        if any(value == x and type(value) is type(x) for x in arguments):
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_typed(arguments[0], x, f"{name}[{i}]") for i, x in enumerate(value))
    elif dataclasses.is_dataclass(hint):
        return build(hint, value, f"{name}.")  # type: ignore[arg-type]
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif type(value) is hint:
        return value
    raise ValueError(f"{name}: expected {_words(hint)}, got {value!r:.80}")


def _words(hint: Any) -> str:
    """A type for a message."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(kind) for kind in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is tuple:
        return f"a list of {_words(arguments[0]).removeprefix('a ')}s"
    names = {str: "a string", int: "an int", float: "a number", bool: "a bool", type(None): "None"}
    return names.get(hint, "an object")
