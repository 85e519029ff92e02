"""The one place that calls `pallas_call`: compiler parameters, names, products, interpret mode."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.backends import triton_memory, triton_parameters

PARTS: Literal["parts"] = "parts"
"""float32 operands as two bfloat16 numbers each, in three products."""
Precision = lax.Precision | lax.DotAlgorithmPreset | Literal["parts"]

# jax announces, while it lowers a kernel, that this backend will leave; users can do nothing there
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)


def dot(a: jax.Array, b: jax.Array, precision: Precision | None) -> jax.Array:
    """`a @ b` accumulated in float32.

    16-bit operands multiply exactly and ignore `precision`. Where one is bfloat16 and the other
    float32, the latter is taken as two bfloat16 numbers: 16 digits, two products.
    """
    if a.dtype == b.dtype and not (a.dtype == jnp.float32 and precision == PARTS):
        wide = a.dtype == jnp.float32
        return jnp.dot(
            a, b, preferred_element_type=jnp.float32, precision=precision if wide else None
        )
    # a part is computed where it is needed, for registers; the product of two rests is left out
    parts = [(i, j) for i in range(_count(a)) for j in range(_count(b)) if i + j < 2]
    return reduce(add, (dot(_part(a, i), _part(b, j), None) for i, j in parts))


def _count(x: jax.Array) -> int:
    """Parts of an operand."""
    return 2 if x.dtype == jnp.float32 else 1


def _part(x: jax.Array, index: int) -> jax.Array:
    """What bfloat16 holds of an operand, and what it holds of the rest."""
    high = x.astype(jnp.bfloat16)
    if index == 0:
        return high
    return (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def masked_load(place: Any, mask: jax.Array) -> jax.Array:
    """What is at `reference.at[...]`, zero where `mask` is False: nothing is read there."""
    loaded: jax.Array = triton_memory().load(place, mask=mask, other=0)
    return loaded


def masked_store(place: Any, values: jax.Array, mask: jax.Array) -> None:
    """Writes where `mask` is True."""
    triton_memory().store(place, values, mask=mask)


def loads_so_far_are_issued(interpret: bool) -> None:
    """A barrier of the program: the compiler moves no load from before it to behind it."""
    if not interpret:
        triton_memory().debug_barrier()


def kernel_call(
    body: Callable[..., None],
    *operands: Any,
    name: str,
    grid: tuple[int, ...],
    in_specs: Sequence[Any],
    out_specs: Any,
    out_shape: Any,
    warps: int,
    stages: int,
    interpret: bool,
    aliases: Mapping[int, int] = MappingProxyType({}),
) -> Any:
    """Runs a kernel through the Triton backend of Pallas (or the interpreter, on any device).

    Operands, specifications and results are pytrees; the body gets one of references for each
    operand, then one for the result. None stands for an array that is not there. `aliases` names
    the operands whose memory becomes a result's, both by their places among the arrays.
    """
    # inside shard_map a result varies over every mesh axis that an operand varies over
    axes = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(operands)]
    varying = jax.sharding.ManualAxisType(varying=frozenset().union(*axes))
    out_shape = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying), out_shape
    )
    with jax.enable_x64(False):  # Python's numbers in bodies and index maps are of 32 bits
        (result,) = pl.pallas_call(
            body,
            grid=grid,
            in_specs=in_specs,
            out_specs=[out_specs],
            out_shape=[out_shape],
            input_output_aliases=dict(aliases),
            compiler_params=None if interpret else triton_parameters(warps=warps, stages=stages),
            interpret=interpret,
            name=name,
        )(*operands)
    return result
