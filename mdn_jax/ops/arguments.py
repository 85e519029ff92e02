"""Checks of the arrays that the operators are called with."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mdn_jax.ops.inputs import wide_dtypes
from mdn_jax.ops.state import CompactState, Kept

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


def check_momentum_rule(
    q: Array,
    k: Array,
    v: Array,
    log_alpha: Array,
    log_mu: Array,
    beta: Array,
    eta: Array,
    p: Array | None,
    initial_state: Kept | None,
    segment_ids: Array | None,
) -> None:
    """Raises ValueError or TypeError for the first array that does not fit."""
    check_values(q, k, v)
    batch, length, heads, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    wide = wide_dtypes(q)
    per_head = (batch, length, value_heads)
    for name, x in (("log_alpha", log_alpha), ("log_mu", log_mu)):
        check_array(name, x, per_head, "[B, T, HV]")
        check_dtype(name, x, wide, f"(with {q.dtype.name} q)")
    for name, x in (("beta", beta), ("eta", eta)):
        check_array(name, x, per_head, "[B, T, HV]")
        check_dtype(name, x, ("bfloat16", "float16", *wide), f"(with {q.dtype.name} q)")
    if p is not None:
        p_heads = p.shape[2] if getattr(p, "ndim", 0) == 4 else value_heads
        allowed = p_heads if p_heads in (heads, value_heads) else value_heads
        check_array("p", p, (batch, length, allowed, key_dim), "[B, T, H or HV, K]")
        check_dtype("p", p, (q.dtype.name,), "(as q)")
    if initial_state is not None:
        _check_state(initial_state, (batch, value_heads, key_dim, value_dim), q, wide)
    if segment_ids is not None:
        check_segment_ids(segment_ids, (batch, length))


def _check_state(state: Any, shape: tuple[int, ...], q: Array, wide: tuple[str, ...]) -> None:
    """Raises ValueError or TypeError for an entering state that does not fit."""
    compact = isinstance(state, CompactState)
    if not compact and (not isinstance(state, tuple) or len(state) != 2):
        raise TypeError(
            f"initial_state: expected an MDNState(s, m) or a CompactState, "
            f"got {type(state).__name__}"
        )
    allowed, why = wide, f"(with {q.dtype.name} q)"
    if compact:
        if q.dtype == jnp.float64:
            raise TypeError(
                "initial_state: expected an MDNState with float64 q, got a CompactState"
            )
        allowed = ("bfloat16",) if state.scale is None else ("float16",)
        why = f"(with{'out' * (state.scale is None)} scale)"
    for name, x in (("s", state[0]), ("m", state[1])):
        check_array(f"initial_state.{name}", x, shape, "[B, HV, K, V]")
        check_dtype(f"initial_state.{name}", x, allowed, why)
    if compact and state.scale is not None:
        scales = (*shape[:2], 2, shape[3])
        check_array("initial_state.scale", state.scale, scales, "[B, HV, 2, V]")
        check_dtype("initial_state.scale", state.scale, ("float32",), "")
