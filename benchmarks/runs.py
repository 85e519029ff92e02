"""Runs side by side on one device, within the time there is, across restarts."""

import hashlib
import json
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from mdn_jax.new_file import new_file


class Run(NamedTuple):
    """One seed with one learning rate."""

    seed: int
    learning_rate: float


class Clock:
    """The time there is.

    Args:
      minutes: from now; None: no end.
    """

    def __init__(self, minutes: float | None):
        # what the last group's first steps and first measurement took: they compile
        self.first: dict[str, float] = {}
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def allows(self, seconds: float) -> bool:
        """Whether something that takes this long can be finished."""
        return self._end is None or time.monotonic() + seconds <= self._end


def groups(seeds: Sequence[int], rates: Sequence[float], most: int) -> Iterator[list[Run]]:
    """The runs of one model, `most` at once; all learning rates of a seed before the next."""
    runs = [Run(seed, rate) for seed in seeds for rate in rates]
    for begin in range(0, len(runs), most):
        yield runs[begin : begin + most]


def checkpoint_name(setting: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """Of a group's checkpoint, by what the group is."""
    text = json.dumps([dict(setting), list(runs)], default=str)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"


def save_group(path: Path, runs: Sequence[Run], state: Any, **about: ArrayLike) -> None:
    """Writes a checkpoint, complete or not at all.

    Args:
      path: the file; its directory is made.
      runs: of the group, in their order in `state`.
      state: a pytree of arrays, keys of random numbers among them.
      **about: arrays besides.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves = [_plain(x) for x in jax.tree.leaves(state)]
    with new_file(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            seeds=np.asarray([run.seed for run in runs]),
            rates=np.asarray([run.learning_rate for run in runs]),
            **{name: np.asarray(x) for name, x in about.items()},  # type: ignore[arg-type]
            **{f"leaf{i}": leaf for i, leaf in enumerate(leaves)},  # type: ignore[arg-type]
        )


def saved_runs(saved: Mapping[str, NDArray[Any]]) -> list[Run]:
    """The runs of an open checkpoint."""
    pairs = zip(saved["seeds"], saved["rates"], strict=True)
    return [Run(int(seed), float(rate)) for seed, rate in pairs]


def saved_state(saved: Mapping[str, NDArray[Any]], like: Any) -> Any:
    """The state of an open checkpoint; `like` has its structure and dtypes."""
    leaves = [
        jax.random.wrap_key_data(jnp.asarray(saved[f"leaf{i}"]))
        if _is_key(x)
        else jnp.asarray(saved[f"leaf{i}"])
        for i, x in enumerate(jax.tree.leaves(like))
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _is_key(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def _plain(x: Any) -> NDArray[Any]:
    return np.asarray(jax.random.key_data(x) if _is_key(x) else x)


def working_commit(*, needed: bool) -> str:
    """Of the working directory, with a mark if it has changes.

    Raises:
      SystemExit: git does not know the directory, and it is needed.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        out = ""
    if not out and needed:
        raise SystemExit("commit: expected --commit or a directory that git knows, got neither")
    return out or "unknown"
