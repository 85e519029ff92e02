"""Checks of what generation is called with."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def row_seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    """The seed of every row: `seed + row`, or those given."""
    seeds = [seed + row for row in range(rows)] if isinstance(seed, int) else list(seed)
    if len(seeds) != rows:
        raise ValueError(f"seed: expected an int or {rows} of them (rows), got {len(seeds)}")
    for value in seeds:
        if not 0 <= value < 2**32:
            raise ValueError(f"seed: expected ints from 0 to 2^32 - 1, got {value!r}")
    return seeds


def check_stop_tokens(stop_tokens: Sequence[int], vocab_size: int) -> list[int]:
    """The stop tokens as ints."""
    for token in stop_tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"stop_tokens: expected ids from 0 to {vocab_size - 1}, got {token!r}")
    return [int(token) for token in stop_tokens]


def check_prompts(
    prompts: Sequence[Sequence[int]], vocab_size: int, had: list[int] | None
) -> list[NDArray[np.int32]]:
    """The prompts as arrays; `had`: tokens that each row of the state has had, if there is one."""
    if not len(prompts):
        raise ValueError("prompts: expected at least one row, got none")
    if had is not None and len(had) != len(prompts):
        raise ValueError(f"prompts: expected {len(had)} rows (as state), got {len(prompts)}")
    checked = []
    for row, prompt in enumerate(prompts):
        tokens = np.asarray(prompt)
        if not tokens.size and (had is None or not had[row]):
            raise ValueError(f"prompts[{row}]: expected at least one token, got none")
        if tokens.size and (tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer)):
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
