"""`silu(gate) * up` of one array of both, backward (`swiglu_bwd`).

Computes, with s = sigmoid(gate):

    dgate = dy up s (1 + gate (1 - s)),      dup = dy gate s,      y = gate s up

    inputs   gate and up side by side [N, 2 F]; dy [N, F]
    outputs  their gradients side by side [N, 2 F], in the dtype of the inputs; y [N, F] in dy's
    grid     rows / 4 x blocks of 512 of F

Why so: bytes are all that it costs. The gradient is one array, as the product behind it takes it,
and y, which the gradient of the matrix after it needs, comes along: it need not be kept.

Constraints: none.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import kernel_call, masked_load, masked_store

_ROWS, _COLUMNS, _WARPS = 4, 512, 4


def swiglu_bwd(
    both: jax.Array, d_y: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The gradient of `silu(gate) * up`, and the product itself.

    Args:
      both: gate and up side by side, `[..., 2 F]`.
      d_y: gradient of the product, `[..., F]`.
      interpret: run the kernel in the interpreter, on any device.

    Returns:
      Gradient `[..., 2 F]`, and the product `[..., F]`.
    """
    width = d_y.shape[-1]
    rows = d_y.size // width
    columns = min(_COLUMNS, pl.next_power_of_2(width))
    shapes = (
        jax.ShapeDtypeStruct((rows, 2 * width), both.dtype),
        jax.ShapeDtypeStruct((rows, width), d_y.dtype),
    )
    d_both, y = kernel_call(
        partial(_body, columns=columns),
        both.reshape(rows, 2 * width),
        d_y.reshape(rows, width),
        name="swiglu_bwd",
        grid=(pl.cdiv(width, columns), pl.cdiv(rows, _ROWS)),
        in_specs=[pl.BlockSpec(), pl.BlockSpec()],
        out_specs=(pl.BlockSpec(), pl.BlockSpec()),
        out_shape=shapes,
        warps=_WARPS,
        stages=1,
        interpret=interpret,
    )
    return d_both.reshape(both.shape), y.reshape(d_y.shape)


def _body(both: Any, d_y: Any, out: Any, *, columns: int) -> None:
    rows, width = d_y.shape
    row = pl.program_id(1) * _ROWS + lax.broadcasted_iota(jnp.int32, (_ROWS, 1), 0)
    lane = pl.program_id(0) * columns + lax.broadcasted_iota(jnp.int32, (1, columns), 1)
    inside = (row < rows) & (lane < width)

    def load(reference: Any, lane: jax.Array) -> jax.Array:
        return masked_load(reference.at[row, lane], inside).astype(jnp.float32)

    def store(reference: Any, lane: jax.Array, values: jax.Array) -> None:
        masked_store(reference.at[row, lane], values.astype(reference.dtype), inside)

    gate, up, d = load(both, lane), load(both, lane + width), load(d_y, lane)
    share = 1.0 / (1.0 + jnp.exp(-gate))
    store(out[0], lane, d * up * share * (1.0 + gate * (1.0 - share)))
    store(out[0], lane + width, d * gate * share)
    store(out[1], lane, gate * share * up)
