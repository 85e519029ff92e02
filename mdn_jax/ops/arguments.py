"""Checks of the arrays that the operators are called with."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

VALUE_DTYPES = ("bfloat16", "float16", "float32", "float64")


def describe(x: object) -> str:
    """Dtype and shape of an array, type and value of anything else."""
    if isinstance(x, (jax.Array, np.ndarray)):
        return f"{x.dtype.name}{list(x.shape)}"
    return f"{type(x).__name__} {x!r}"


def check_array(name: str, x: object, shape: tuple[int, ...], letters: str) -> None:
    """Raises unless `x` is an array of this shape; `letters` name its axes."""
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(f"{name}: expected an array {letters}, got {describe(x)}")
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {letters} = {list(shape)}, got {describe(x)}")


def check_dtype(name: str, x: Array, allowed: tuple[str, ...], why: str) -> None:
    """Raises unless `x` has one of the dtypes; `why` ends the sentence."""
    if x.dtype.name not in allowed:
        raise TypeError(f"{name}: expected {' or '.join(allowed)} {why}, got {x.dtype.name}")


def check_values(q: Array, k: Array, v: Array) -> None:
    """Raises unless `q, k` `[B, T, H, K]` and `v` `[B, T, HV, V]` fit each other."""
    for name, x, letters in (("q", q, "[B, T, H, K]"), ("v", v, "[B, T, HV, V]")):
        if not isinstance(x, (jax.Array, np.ndarray)):
            raise TypeError(f"{name}: expected an array {letters}, got {describe(x)}")
        if x.ndim != 4:
            raise ValueError(f"{name}: expected rank 4, {letters}, got {describe(x)}")
        if 0 in x.shape:
            raise ValueError(f"{name}: expected every dimension >= 1, got {describe(x)}")
    batch, length, heads, _ = q.shape
    value_heads = v.shape[2]
    check_array("k", k, q.shape, "[B, T, H, K] (as q)")
    if v.shape[:2] != (batch, length):
        raise ValueError(
            f"v: expected [B, T, HV, V] with B, T = {batch}, {length} (as q), got {describe(v)}"
        )
    if value_heads % heads:
        raise ValueError(
            f"v: expected HV a multiple of H = {heads} (q's heads), got HV = {value_heads}"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_dtype(name, x, VALUE_DTYPES, "")
        check_dtype(name, x, (q.dtype.name,), "(as q)")


def check_segment_ids(segment_ids: Int[Array, "B T"], shape: tuple[int, int]) -> None:
    """Raises unless `segment_ids` is `[B, T]` and integer; any values, see `document_starts`."""
    check_array("segment_ids", segment_ids, shape, "[B, T]")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids: expected an integer dtype, got {segment_ids.dtype.name}")


def outside(ids: Int[Array, "*B"], size: int) -> Bool[Array, "*B"]:
    """Which of the ids are not in `[0, size)`, compared in their own dtype."""
    return (ids < 0) | (ids > min(size - 1, jnp.iinfo(ids.dtype).max))


def _check_scale(scale: Any) -> None:
    expected = "scale: expected a finite number or None"
    real = isinstance(scale, int | float) and not isinstance(scale, bool)
    if isinstance(scale, jax.Array | np.ndarray | np.generic):
        number = jnp.issubdtype(scale.dtype, np.floating) or jnp.issubdtype(scale.dtype, np.integer)
        real = scale.ndim == 0 and number
    if not real:
        raise TypeError(f"{expected}, got {describe(scale)}")
    if isinstance(scale, jax.core.Tracer):
        return
    try:
        finite = math.isfinite(scale)
    except OverflowError:  # an int that no float has
        finite = False
    if not finite:
        raise ValueError(f"{expected}, got {scale!r}")


def check_options(
    scale: float | Array | None,
    chunk_size: int | None,
    implementation: str | None,
    implementations: tuple[str, ...],
) -> None:
    """Raises ValueError or TypeError for an option of an operator that does not fit."""
    if chunk_size is not None and (
        not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1
    ):
        raise ValueError(f"chunk_size: expected an int >= 1 or None, got {chunk_size!r}")
    if scale is not None:
        _check_scale(scale)
    if implementation is not None and implementation not in implementations:
        raise ValueError(
            f"implementation: expected one of {', '.join(implementations)} or None, "
            f"got {implementation!r}"
        )
