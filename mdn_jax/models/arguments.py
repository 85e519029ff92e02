"""Checks of what generation is called with."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdn_jax.models.fields import require


def is_whole(value: Any, least: int) -> bool:
    """Whether it is an int, of numpy's too, no bool, and not below `least`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and int(value) >= least


def is_real(value: Any, least: float = 0.0) -> bool:
    """Whether it is a finite number, of numpy's too, no bool, and not below `least`."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and least <= float(value) < math.inf


def row_seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    """The seed of every row: `seed + row`, or those given."""
    given = _ints("seed", seed, "ints from 0 to 2^32 - 1")
    if given.ndim and given.shape != (rows,):
        raise ValueError(f"seed: expected an int or {rows} of them (rows), got {given.size}")
    seeds = given.tolist() if given.ndim else [int(given) + row for row in range(rows)]
    for value in seeds:
        if not 0 <= value < 2**32:
            raise ValueError(f"seed: expected ints from 0 to 2^32 - 1, got {value!r}")
    return seeds


def row_limits(name: str, limits: int | Sequence[int], rows: int) -> NDArray[np.int32]:
    """The number of every row, at least 1: one for all, or those given."""
    expected = "an int >= 1"
    if not isinstance(limits, Sequence | np.ndarray):
        require(name, limits, expected, is_whole(limits, 1))
        return np.full((rows,), limits, np.int32)
    given = _ints(name, limits, f"{expected}, or one a row")
    if given.shape != (rows,):
        raise ValueError(f"{name}: expected an int or {rows} of them (rows), got {len(limits)}")
    for value in given.tolist():
        require(name, value, expected, value >= 1)
    return given.astype(np.int32)


def row_stop_tokens(
    stop_tokens: Sequence[int] | Sequence[Sequence[int]], rows: int, vocab_size: int
) -> list[list[int]]:
    """The stop tokens of every row: the same for all, or those given for each."""
    given: Any = stop_tokens
    nested = isinstance(given, Sequence) and [isinstance(one, list | tuple) for one in given]
    if not nested or not all(nested):
        return [check_stop_tokens(given, vocab_size)] * rows
    if len(given) != rows:
        raise ValueError(
            f"stop_tokens: expected token ids, or {rows} lists of them (rows), "
            f"got {len(given)} lists"
        )
    return [check_stop_tokens(one, vocab_size) for one in given]


def check_stop_tokens(stop_tokens: Any, vocab_size: int) -> list[int]:
    """The stop tokens as ints."""
    expected = f"ids from 0 to {vocab_size - 1}"
    tokens = _ints("stop_tokens", stop_tokens, f"a list of {expected}")
    if tokens.ndim != 1:
        raise ValueError(f"stop_tokens: expected a list of {expected}, got {stop_tokens!r}")
    for token in tokens.tolist():
        if not 0 <= token < vocab_size:
            raise ValueError(f"stop_tokens: expected {expected}, got {token!r}")
    return [int(token) for token in tokens]


def check_prompts(prompts: Any, vocab_size: int, had: list[int] | None) -> list[NDArray[np.int32]]:
    """The prompts as arrays; `had`: tokens that each row of the state has had, if there is one."""
    if not isinstance(prompts, Sequence) and not hasattr(prompts, "__array__"):
        raise ValueError(f"prompts: expected rows of token ids, got {prompts!r}")
    if not len(prompts):
        raise ValueError("prompts: expected at least one row, got none")
    if had is not None and len(had) != len(prompts):
        raise ValueError(f"prompts: expected {len(had)} rows (as state), got {len(prompts)}")
    checked = []
    for row, prompt in enumerate(prompts):
        tokens = _ints(f"prompts[{row}]", prompt, "token ids")
        if not tokens.size and (had is None or not had[row]):
            raise ValueError(f"prompts[{row}]: expected at least one token, got none")
        if tokens.ndim != 1:
            raise ValueError(
                f"prompts[{row}]: expected token ids, got {tokens.dtype.name}{list(tokens.shape)}"
            )
        outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if outside.size:
            raise ValueError(
                f"prompts[{row}]: expected ids from 0 to {vocab_size - 1}, got {int(outside[0])}"
            )
        checked.append(tokens.astype(np.int32))
    return checked


def without_padding(prompts: Any, attention_mask: Any) -> list[NDArray[Any]]:
    """The tokens of each row that count, of prompts `[B, T]` and a mask of the same shape."""
    try:
        tokens, mask = np.asarray(prompts), np.asarray(attention_mask)
    except ValueError:  # lists of different lengths
        raise ValueError(
            "attention_mask: expected with it prompts [B, T] and a mask of the same shape, "
            "got rows of different lengths"
        ) from None
    if tokens.ndim != 2 or mask.shape != tokens.shape:
        raise ValueError(
            f"attention_mask: expected the shape [B, T] of prompts, got {list(mask.shape)} "
            f"and prompts {list(tokens.shape)}"
        )
    rows = []
    for row, (ids, counts) in enumerate(zip(tokens, mask, strict=True)):
        if not np.isin(counts, (0, 1)).all():
            raise ValueError(f"attention_mask[{row}]: expected 0 and 1, got {counts.tolist()}")
        own = np.flatnonzero(counts)
        if own.size and own[-1] - own[0] + 1 != own.size:
            raise ValueError(
                f"attention_mask[{row}]: expected padding on the left and on the right, "
                f"got a 0 between ones at {int(own[0] + np.argmin(counts[own[0] :]))}"
            )
        rows.append(ids[own])
    return rows


def _ints(name: str, values: Any, expected: str) -> NDArray[np.integer]:
    """An int or a list of them as an array."""
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        raise ValueError(f"{name}: expected {expected}, got {values!r}") from None
    if not array.size:
        return array.astype(np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        shown = f"{array.dtype.name}{list(array.shape)}" if array.ndim else repr(values)
        raise ValueError(f"{name}: expected {expected}, got {shown}")
    return array
