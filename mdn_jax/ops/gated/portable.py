"""What the public functions of the gated rules do around the scan and the chunk algorithm."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mdn_jax.ops.arguments import check_array, check_dtype, check_segment_ids, check_values
from mdn_jax.ops.gated.chunkwise import chunkwise_gated
from mdn_jax.ops.gated.inputs import GatedInputs
from mdn_jax.ops.gated.scan import scan_gated
from mdn_jax.ops.inputs import in_full_precision

PortableImplementation = Literal["scan", "xla"]
"""What runs on any device: the definition, and the chunk algorithm."""


def wide_dtypes(q: Array) -> tuple[str, ...]:
    """Dtypes of gates and states beside these queries."""
    return ("float32", "float64") if q.dtype == jnp.float64 else ("float32",)


def compute_dtype(q: Array) -> jnp.dtype:
    """What the rules compute in."""
    return jnp.dtype(jnp.float64 if q.dtype == jnp.float64 else jnp.float32)


def check_common(q: Array, k: Array, v: Array, segment_ids: Array | None) -> None:
    """Raises ValueError or TypeError for an array that every rule has and that does not fit."""
    check_values(q, k, v)
    if segment_ids is not None:
        check_segment_ids(segment_ids, (q.shape[0], q.shape[1]))


def check_gate(
    name: str, x: Array, shape: tuple[int, ...], letters: str, dtypes: tuple[str, ...], q: Array
) -> None:
    """Raises ValueError or TypeError unless a gate or a state has this shape and such a dtype."""
    check_array(name, x, shape, letters)
    check_dtype(name, x, dtypes, f"(with {q.dtype.name} q)")


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


def run_portable(
    implementation: PortableImplementation,
    inputs: GatedInputs,
    state: Float[Array, "B HV K V"],
    *,
    v: Float[Array, "B T HV V"],
    delta: bool,
    scale: float,
    chunk_size: int | None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
    """Outputs in the dtype of `v`, the values as they came, and the final state."""
    batch, heads = inputs.v.shape[0], inputs.v.shape[2]
    groups = state.reshape(batch, heads, -1, *state.shape[2:])
    if implementation == "scan":
        o, final = scan_gated(inputs, groups, delta=delta, scale=scale, chunk_size=chunk_size)
    else:
        o, final = chunkwise_gated(
            inputs,
            groups,
            delta=delta,
            scale=scale,
            chunk_size=chunk_size,
            precision=product_precision(v),
        )
    return o.reshape(v.shape).astype(v.dtype), final.reshape(state.shape)


def product_precision(v: Array) -> lax.Precision:
    """Of the products with K- and V-sized operands, by the dtype of the values."""
    full = v.dtype.itemsize > 2 or in_full_precision()
    return lax.Precision.HIGHEST if full else lax.Precision.DEFAULT
