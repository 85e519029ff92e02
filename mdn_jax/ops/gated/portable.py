"""What the public functions of the gated rules do around the scan and the chunk algorithm."""

from typing import Literal

from jaxtyping import Array, Float

from mdn_jax.ops.arguments import check_array, check_dtype, check_segment_ids, check_values
from mdn_jax.ops.gated.chunkwise import chunkwise_gated
from mdn_jax.ops.gated.inputs import GatedInputs
from mdn_jax.ops.gated.scan import scan_gated
from mdn_jax.ops.inputs import product_precision

PortableImplementation = Literal["scan", "xla"]
"""What runs on any device: the definition, and the chunk algorithm."""


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
