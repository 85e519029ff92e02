"""Sums that tell whether arrays read back are those that were written."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


@jax.jit  # for each array by itself: few shapes, and no program of thousands of sums
def _sum(x: Array) -> UInt32[Array, ""]:
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize])
    return jnp.sum(words, dtype=jnp.uint32)


def checksums(tree: Any) -> dict[str, int]:
    """The sum of every array's bits as words, modulo 2^32, by its path.

    It does not depend on how an array is cut, as sums of integers do not depend on their order, and
    is not the same after a change of any one word, or of any stretch to zeros that were none.

    Args:
      tree: of arrays, on any devices.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    sums = jax.device_get([_sum(x) for _, x in leaves])
    return dict(zip(names, map(int, sums), strict=True))
