"""Inputs of the rule in the form that its implementations share: grouped heads, cut into chunks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

L2_EPSILON = 1e-6
_LONG = 2.0**16  # the largest element of a row that stays as it is
_FULL_PRECISION = ("highest", "float32")


class RuleInputs(NamedTuple):
    """Arrays of one call, or of a piece of it, with the value heads grouped by their key head.

    Letters: `B` batch, `T` time, `H` key heads, `G` value heads per key head, `K`, `V` head dims.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H G V"]
    log_alpha: Float[Array, "B T H G"]
    log_mu: Float[Array, "B T H G"]
    beta: Float[Array, "B T H G"]
    eta: Float[Array, "B T H G"]
    p: Float[Array, "B T H P K"] | None  # P = 1 (shared by a group) or G; None means alpha * k
    starts: Bool[Array, "B T"]  # the first step of a document, but for a row's first document


def l2_normalize(x: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    """`x / sqrt(sum(x^2) + 1e-6)` over the last axis (the training form: epsilon in the root).

    Of any finite `x`: long rows are first made shorter, by a power of two, so that neither squares
    nor, in gradients, the third power of a norm leave the range.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    # the power of two nearest to the part of the length that is taken away; its reciprocal is exact
    bits = jnp.finfo(x.dtype).nexp
    by = 1 / jnp.maximum(jax.lax.reduce_precision(largest / _LONG, bits, 0), 1)
    x = x * by
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + L2_EPSILON * by * by)


def in_full_precision() -> bool:
    """Whether `jax.default_matmul_precision` asks for products of all digits of float32."""
    return jax.config.jax_default_matmul_precision in _FULL_PRECISION


def product_precision(v: Array) -> lax.Precision:
    """Of the products with K- and V-sized operands, by the dtype of the values."""
    full = v.dtype.itemsize > 2 or in_full_precision()
    return lax.Precision.HIGHEST if full else lax.Precision.DEFAULT


def wide_dtypes(q: Array) -> tuple[str, ...]:
    """Dtypes of gates and states beside these queries."""
    return ("float32", "float64") if q.dtype == jnp.float64 else ("float32",)


def compute_dtype(q: Array) -> jnp.dtype:
    """What the rules compute in."""
    return jnp.dtype(jnp.float64 if q.dtype == jnp.float64 else jnp.float32)


def entering_state(
    given: Array | None, shape: tuple[int, ...], dtype: jnp.dtype, like: Array
) -> Array:
    """The state before the first step: as given, or zeros."""
    if given is not None:
        return jnp.asarray(given, dtype)
    # inside shard_map the states differ over the mesh axes that the inputs differ over
    varying = tuple(jax.typeof(like).manual_axis_type.varying)
    return lax.pcast(jnp.zeros(shape, dtype), varying, to="varying")


def grouped(x: Array, heads: int, dtype: jnp.dtype) -> Array:
    """`[B, T, HV, ...] -> [B, T, H, G, ...]`, in the dtype to compute in."""
    return x.reshape(*x.shape[:2], heads, -1, *x.shape[3:]).astype(dtype)


def document_starts(
    segment_ids: Int[Array, "B T"] | None, shape: tuple[int, int]
) -> Bool[Array, "B T"]:
    """Where a row's next document begins: where an id is not the one before, whatever they are.

    This is all that segment ids mean, to every layer. A row's first step is never a start.
    """
    if segment_ids is None:
        return jnp.zeros(shape, bool)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changes, ((0, 0), (1, 0)))


def document_numbers(
    segment_ids: Int[Array, "B T"] | None, shape: tuple[int, int]
) -> Int[Array, "B T"]:
    """The documents of a row counted from 0, int32: segment ids of the same meaning."""
    return jnp.cumsum(document_starts(segment_ids, shape), axis=1, dtype=jnp.int32)


def pad_time[Inputs](inputs: Inputs, count: int) -> Inputs:
    """Appends `count` steps of zeros: they leave the states as they are (decays 1, writes 0)."""
    if count == 0:
        return inputs

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, count)) + ((0, 0),) * (x.ndim - 2))

    return jax.tree.map(pad, inputs)


def split_time[Inputs](inputs: Inputs, chunk: int) -> Inputs:
    """`[B, NT * C, ...] -> [NT, B, C, ...]` for every array."""

    def split(x: Array) -> Array:
        batch, length, *rest = x.shape
        return jnp.moveaxis(x.reshape(batch, length // chunk, chunk, *rest), 1, 0)

    return jax.tree.map(split, inputs)
