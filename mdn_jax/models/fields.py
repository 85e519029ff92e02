"""Checks of configuration fields, and the published keys that mean nothing here."""

import difflib
from collections.abc import Callable
from typing import Any

# the largest number, and the smallest above 0, with all of the digits of float32
_FLOAT32_MAX, _FLOAT32_MIN = 3.4028234663852886e38, 2.0**-126


def unknown(key: str, prefix: str, known: set[str]) -> ValueError:
    """The error of a key that is not known, with the closest one that is."""
    close = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
    return ValueError(f"{prefix}{key}: unknown key; the closest known one is {prefix}{close[0]}")


MAX_SIZE = 2**31 - 1
"""The largest size, of a width or a vocabulary: what an int32 index reaches."""

NUMBER = "that float32 holds"
"""Of which range a number is, in messages."""


def require(name: str, value: object, expected: str, fits: bool) -> None:
    """Raises ValueError unless the value fits."""
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {_shown(value)}")


def require_size(
    name: str, value: int | None, least: int = 1, most: int = MAX_SIZE, *, or_none: bool = False
) -> None:
    """Raises ValueError unless it is an int in this range, or None where that is allowed."""
    if value is None and or_none:
        return
    or_else = " or None" if or_none else ""
    require(name, value, f"an int >= {least}{or_else}", is_int(value, least))
    require(name, value, f"an int <= {most}{or_else}", not is_int(value, most + 1))


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits, lists in lists in lists
        return f"one of type {type(value).__name__} that is too long to show"
    return text if len(text) <= 200 else f"{text[:200]}..."


def is_int(value: object, least: int) -> bool:
    """Whether it is an int, no bool, and not below `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Whether it is a number, no bool, that float32 holds."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -_FLOAT32_MAX <= value <= _FLOAT32_MAX  # also of ints that no float holds, and of nan


def is_positive(value: Any) -> bool:
    """Whether it is a number above 0 that float32 holds."""
    return is_number(value) and value >= _FLOAT32_MIN


def _one_of(*values: object) -> tuple[str, Callable[[object], bool]]:
    expected = " or ".join(repr(value) for value in values)
    return expected, lambda value: any(value is v or value == v for v in values)


def _of_type(expected: str, *types: type) -> tuple[str, Callable[[object], bool]]:
    return expected, lambda value: isinstance(value, types)


_BOOL = _of_type("a bool", bool)
_TOKEN = _of_type("a token id or None", int, type(None))
_TEXT = _of_type("a string or None", str, type(None))

# Published keys that change nothing that is computed here, with the values for which that holds.
WITHOUT_MEANING: dict[str, tuple[str, Callable[[object], bool]]] = {
    "_name_or_path": _TEXT,
    "architectures": _of_type("a list or None", list, tuple, type(None)),
    "attn_mode": _one_of("chunk", "fused_recurrent"),
    "bos_token_id": _TOKEN,
    "dtype": _TEXT,
    "eos_token_id": _TOKEN,
    "fuse_cross_entropy": _BOOL,
    "fuse_linear_cross_entropy": _BOOL,
    "fuse_norm": _BOOL,
    "fuse_swiglu": _BOOL,
    "hidden_act": _one_of("swish", "silu"),
    "layer_idx": _of_type("an int or None", int, type(None)),
    "max_position_embeddings": _of_type("an int or None", int, type(None)),
    "mode": _one_of("chunk", "fused_recurrent"),
    "model_type": _one_of("momentum_deltanet"),
    "pad_token_id": _TOKEN,
    "torch_dtype": _TEXT,
    "transformers_version": _TEXT,
    "use_cache": _BOOL,
    "use_l2warp": _one_of(False),
}
