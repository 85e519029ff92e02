"""Checks of what a layer is called with."""

import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mdn_jax.ops.arguments import check_segment_ids


def check_activations(
    x: Array, hidden_size: int, segment_ids: Array | None, lengths: Array | None
) -> None:
    """Raises unless `x` is `[B, T, hidden_size]` of a float dtype and the others fit it."""
    expected = f"expected [B, T, hidden_size = {hidden_size}] with B, T >= 1"
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise TypeError(f"x: {expected}, got {type(x).__name__}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x: expected a float dtype, got {x.dtype.name}")
    if x.ndim != 3 or x.shape[2] != hidden_size or 0 in x.shape:
        raise ValueError(f"x: {expected}, got {list(x.shape)}")
    if segment_ids is not None:
        check_segment_ids(segment_ids, (x.shape[0], x.shape[1]))
    check_lengths(lengths, segment_ids, (x.shape[0], x.shape[1]))


def check_lengths(lengths: Array | None, segment_ids: Array | None, shape: tuple[int, int]) -> None:
    """Raises unless `lengths` is None, or `[B]`, integer and (where known) from 0 to `T`."""
    if lengths is None:
        return
    expected = f"expected integers [B] = [{shape[0]}] from 0 to T = {shape[1]}"
    if segment_ids is not None:
        raise ValueError("lengths: expected None with segment_ids, got both")
    if not hasattr(lengths, "dtype") or not hasattr(lengths, "shape"):
        raise TypeError(f"lengths: {expected}, got {type(lengths).__name__}")
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths: {expected}, got {lengths.dtype.name}")
    if lengths.shape != shape[:1]:
        raise ValueError(f"lengths: {expected}, got shape {list(lengths.shape)}")
    if not isinstance(lengths, jax.core.Tracer):
        outside = [n for n in np.asarray(lengths).tolist() if not 0 <= n <= shape[1]]
        if outside:
            raise ValueError(f"lengths: {expected}, got {outside[0]}")


def counted(lengths: Int[Array, " B"], length: int) -> Bool[Array, "B T"]:
    """Which steps of a padded row are its own."""
    return jnp.arange(length) < lengths[:, None]


def without_padding(x: Array, lengths: Int[Array, " B"] | None) -> Array:
    """`x` `[B, T, ...]` with zeros where a padded row's own steps have ended, whatever was there.

    What is not finite stays so in any product, even with a weight of zero, forward and backward.
    """
    if lengths is None:
        return x
    own = counted(lengths, x.shape[1])
    return jnp.where(own.reshape(*own.shape, *(1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def check_cache(cache: Any, kind: type, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Raises unless `cache` is of the layer's kind, with these shapes (None: any size)."""
    if not isinstance(cache, kind):
        raise TypeError(f"cache: expected {kind.__name__} or None, got {type(cache).__name__}")
    for name, shape in shapes.items():
        got = list(getattr(operator.attrgetter(name)(cache), "shape", ()))
        wildcard = [n if m is None else m for m, n in zip(shape, got, strict=False)]
        if len(got) != len(shape) or got != wildcard:
            expected = ", ".join("any" if n is None else str(n) for n in shape)
            raise ValueError(f"cache.{name}: expected shape [{expected}], got {got}")
