"""Digests that tell whether what is read back is what was written."""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32
from numpy.typing import NDArray

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}
_BLOCK = 1 << 15  # words that are worked on at a time on the host: they stay in a core's cache
# the odd number nearest to 2^32 / golden ratio: rows of up to 2^32 words in all start far apart
_ROW = np.uint32(0x9E3779B1)
# of Wellons' hash with the lowest bias of its kind; odd, so that no two words become one
_FIRST, _SECOND = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


def _plain(words: Any, rows: Any, columns: Any) -> Any:
    """The sum of the words: what checkpoints had at first. Does not see their order."""
    return words.sum(dtype=np.uint32)


def _mixed(words: Any, rows: Any, columns: Any) -> Any:
    """The sum of every word mixed with its place.

    A word that changes changes the sum, for the mixture of a place is one to one. It does not
    matter how an array is cut, as sums of integers do not depend on their order.
    """
    x = words ^ (rows * _ROW + columns)
    x = (x ^ (x >> 16)) * _FIRST
    x = (x ^ (x >> 15)) * _SECOND
    return (x ^ (x >> 16)).sum(dtype=np.uint32)


# (words [R, C] uint32, number of each row [R, 1], of each column [C]) -> sum modulo 2^32
_KINDS: dict[str, Callable[[Any, Any, Any], Any]] = {"sum": _plain, "mixed sum": _mixed}
OLD, NEW = _KINDS


class Digests(NamedTuple):
    """A digest for every array of a tree.

    Attributes:
      kind: how they are computed, a key of the table of kinds.
      arrays: digest, below 2^32, by the array's path.
    """

    kind: str
    arrays: Mapping[str, int]

    def check(self, tree: Any) -> None:
        """Raises ValueError unless the arrays of a tree are those that these digests are of.

        Args:
          tree: of arrays, some or all of those of the digests.
        """
        if self.kind not in _KINDS:
            raise ValueError(f"digests of a kind that is not known: {self.kind!r}")
        found = digests(tree, kind=self.kind).arrays
        wrong = [name for name, x in found.items() if self.arrays.get(name) != x]
        if wrong:
            raise ValueError(f"wrong digests of {len(wrong)} array(s): {', '.join(wrong[:3])}")


def digests(tree: Any, *, kind: str = NEW) -> Digests:
    """Digests of arrays: of their bits and of the order of these, however an array is cut.

    Args:
      tree: of arrays, on any devices or (numpy) on the host. Those of the host and of processors
        are read once, by all cores, and nothing is compiled for them.
      kind: one that is known.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    with ThreadPoolExecutor() as threads:
        on_host = {
            i: threads.submit(_on_host, x, kind)
            for i, (_, x) in enumerate(leaves)
            if _host_reads(x)
        }
        on_devices = {
            i: _on_devices(x, kind) for i, (_, x) in enumerate(leaves) if i not in on_host
        }
        sums = jax.device_get(on_devices) | {i: x.result() for i, x in on_host.items()}
    return Digests(kind, {name: int(sums[i]) for i, name in enumerate(names)})


def _host_reads(x: Any) -> bool:
    """Whether it lies in the host's memory, and all of it in this one's."""
    if not isinstance(x, jax.Array):
        return True
    return x.is_fully_addressable and all(device.platform == "cpu" for device in x.devices())


@partial(jax.jit, static_argnums=1)  # for each array by itself: few shapes, few programs
def _on_devices(x: Array, kind: str) -> UInt32[Array, ""]:
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    if x.dtype.itemsize == 8:  # its words are an axis of their own
        words = words.reshape(*x.shape[:-1], -1)
    words = jnp.atleast_1d(words)
    rows = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape[:-1]):  # modulo 2^32, as on the host
        rows = rows * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    columns = jax.lax.broadcasted_iota(jnp.uint32, words.shape, words.ndim - 1)
    return _KINDS[kind](words, rows, columns)


def _on_host(x: NDArray[Any] | Array, kind: str) -> int:
    x = np.asarray(x)
    if not x.size:
        return 0
    words = np.atleast_1d(np.ascontiguousarray(x)).view(_WORDS[x.dtype.itemsize])
    words = words.reshape(-1, words.shape[-1])
    count, length = words.shape
    step = max(1, _BLOCK // length)
    columns = np.arange(length, dtype=np.int64).astype(np.uint32)
    total = 0
    for start in range(0, count, step):
        block = words[start : start + step].astype(np.uint32, copy=False)
        rows = np.arange(start, start + len(block), dtype=np.int64).astype(np.uint32)
        total += int(_KINDS[kind](block, rows[:, None], columns))
    return total % (1 << 32)


def file_digest(path: Path) -> str | None:
    """SHA-256 of a file as hexadecimal digits; None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(values: Any) -> str:
    """SHA-256 of JSON values, whatever the order of their keys, as hexadecimal digits."""
    values = json.loads(json.dumps(values))  # what is read back: lists, and keys that are strings
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
