"""States of prompts that were read, by their tokens: what many prompts begin with is read once."""

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from mdn_jax.models import GenerationState, MDNForCausalLM
from mdn_jax.models.state_file import load_state, save_state
from mdn_jax.new_file import write_text

log = logging.getLogger(__name__)

_INDEX = "prefixes.json"
_FORMAT = "mdn-jax prefixes 1"
SHARED = 16
"""Tokens that two prompts have in common, beyond what is kept, for a state to be kept there."""

Tokens = NDArray[np.int32]


class Found(NamedTuple):
    """What there is of a prompt.

    Attributes:
      length: tokens that the state has had; 0: none.
      state: after them, of one row; None: there is none.
      branch: where the prompt leaves another one that was read, if a state there is worth keeping;
        0: nowhere.
    """

    length: int
    state: GenerationState | None
    branch: int


class _Entry(NamedTuple):
    tokens: Tokens
    state: GenerationState
    size: int


class PrefixCache:
    """States of one row each, bounded; those that were not used longest go first.

    It belongs to one thread.

    Args:
      most_bytes: of the states; 0 keeps none.
      most_entries: how many, as each is compared with every new prompt.

    Attributes:
      size: bytes of the states.
    """

    def __init__(self, most_bytes: int, most_entries: int = 256) -> None:
        self.size = 0
        self._most_bytes, self._most_entries = most_bytes, most_entries
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def has_room(self, state: GenerationState) -> bool:
        """Whether a state of this size can be kept at all."""
        return _size(state) <= self._most_bytes and self._most_entries > 0

    def find(self, prompt: Sequence[int]) -> Found:
        """The state of the longest beginning of a prompt that is there, and where it branches."""
        tokens = np.asarray(prompt, np.int32)
        best, branch = None, 0
        for key, entry in self._entries.items():
            common = common_length(tokens, entry.tokens)
            branch = max(branch, common)
            if common == len(entry.tokens) and (best is None or common > len(best[1].tokens)):
                best = key, entry
        count, state = 0, None
        if best is not None:
            self._entries.move_to_end(best[0])
            count, state = len(best[1].tokens), best[1].state
        shares = branch - count >= SHARED and branch < len(tokens)
        return Found(count, state, branch if shares else 0)

    def put(self, prompt: Sequence[int], state: GenerationState) -> None:
        """Keeps a state of one row after these tokens, if there is room for it at all."""
        tokens = np.asarray(prompt, np.int32)
        size = _size(state) + tokens.nbytes
        key = tokens.tobytes()
        if size > self._most_bytes:
            return
        if key in self._entries:
            self._entries.move_to_end(key)
            return
        self._entries[key] = _Entry(tokens, state, size)
        self.size += size
        while self.size > self._most_bytes or len(self._entries) > self._most_entries:
            self.size -= self._entries.popitem(last=False)[1].size

    def save(self, directory: Path, model: MDNForCausalLM) -> None:
        """Writes all states, a file of `save_state` each, and which tokens they have had.

        Files of states that are gone are removed. The tokens are those of people's prompts, so
        nobody else may read the directory.

        Raises:
          OSError: something cannot be written.
        """
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        kept = {_name(entry.tokens): entry for entry in self._entries.values()}
        for name, entry in kept.items():
            if not (directory / name).exists():
                save_state(directory / name, entry.state, model)
        listed = [entry.tokens.tolist() for entry in kept.values()]
        write_text(directory / _INDEX, json.dumps({"format": _FORMAT, "prefixes": listed}))
        for path in directory.glob("*.npz"):
            if path.name not in kept:
                path.unlink()

    def load(
        self,
        directory: Path,
        model: MDNForCausalLM,
        fit: Callable[[GenerationState], GenerationState],
    ) -> None:
        """Reads what `save` wrote; a state that cannot be used is left out, with a warning.

        Args:
          directory: of `save`; there may be none yet.
          model: that goes on.
          fit: makes a state as the server has it.

        Raises:
          ValueError: an index that is none.
          OSError: it cannot be read.
        """
        path = directory / _INDEX
        if not path.exists():
            return
        try:
            index = json.loads(path.read_bytes())
            fits = index["format"] == _FORMAT
            prompts = [np.asarray(tokens, np.int32) for tokens in index["prefixes"]]
            if not fits or any(tokens.ndim != 1 for tokens in prompts):
                raise ValueError("another format")
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"prefix_dir: expected {_INDEX} of a server, got {path}: {error}"
            ) from None
        for tokens in prompts:
            try:
                state = load_state(directory / _name(tokens), model)
                if np.asarray(state.position).tolist() != [len(tokens)]:
                    raise ValueError(f"state: expected {len(tokens)} tokens, got others")
                self.put(tokens.tolist(), fit(state))
            except (ValueError, OSError) as error:
                log.warning("prefix_dir: a state was left out: %s", error)


def _size(state: GenerationState) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(state))


def common_length(first: Sequence[int] | Tokens, second: Sequence[int] | Tokens) -> int:
    """How many tokens both begin with."""
    size = min(len(first), len(second))
    differ = np.asarray(first[:size], np.int32) != np.asarray(second[:size], np.int32)
    at = int(differ.argmax()) if size else 0
    return at if size and differ[at] else size


def _name(tokens: Tokens) -> str:
    return f"{hashlib.sha256(tokens.astype('<i4').tobytes()).hexdigest()}.npz"
