"""Checks of configuration fields, and the published keys that mean nothing here."""

import difflib
import math
from collections.abc import Callable
from typing import Any


def unknown(key: str, prefix: str, known: set[str]) -> ValueError:
    """The error of a key that is not known, with the closest one that is."""
    close = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
    return ValueError(f"{prefix}{key}: unknown key; the closest known one is {prefix}{close[0]}")


def require(name: str, value: object, expected: str, fits: bool) -> None:
    """Raises ValueError unless the value fits."""
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def is_int(value: object, least: int) -> bool:
    """Whether it is an int, no bool, and not below `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Whether it is a finite number, no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_positive(value: Any) -> bool:
    """Whether it is a finite number above 0."""
    return is_number(value) and value > 0


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
    "allow_neg_eigval": _one_of(False),
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
