"""Norms and SwiGLU whose backward passes are kernels along rows, on GPUs that have them.

Forward passes are XLA's. Under a mesh the kernels run inside `jax.shard_map`, on each device's
rows, tokens and heads. The cross entropy of logits, with its gradient, is a kernel as well.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from mdn_jax.ops import api
from mdn_jax.ops.context import varying
from mdn_jax.ops.on_mesh import Cuts, types_are_checked

MIN_STEPS = 16
"""Shorter calls, such as steps of decoding, are left to XLA."""

GateActivation = Literal["sigmoid", "silu"]

ACTIVATIONS: dict[GateActivation, Callable[[Array], Array]] = {
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
}


def on_kernels(x: Array) -> bool:
    """Whether the backward pass of activations `[B, T, ..., D]` is one of kernels."""
    capability = api._capability()
    if capability is None or x.ndim not in (3, 4):
        return False
    from pallas_kernels.rowwise import MAX_WIDTH, unsupported  # not with the library

    if unsupported(x, capability):
        return False
    return x.shape[1] >= MIN_STEPS and x.shape[-1] <= MAX_WIDTH


class Places(NamedTuple):
    """Where the tokens of a call lie.

    Attributes:
      cuts: axes over which rows, tokens and heads are cut; none of them that does not divide.
      axes: all that the partitioner has.
    """

    cuts: Cuts
    axes: frozenset[str]


class Norm(NamedTuple):
    """What is fixed of a norm.

    Attributes:
      eps: inside the root.
      activation: of the gate.
      dtype: of the output.
    """

    eps: float
    activation: GateActivation
    dtype: jax.typing.DTypeLike


def normalized(
    norm: Norm, x: Float[Array, "*B D"], scale: Float[Array, " D"], gate: Array | None
) -> Float[Array, "*B D"]:
    """`x / sqrt(mean x^2 + eps) * scale * activation(gate)`, float32 inside (float64)."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = x.astype(wide)
    y *= lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + norm.eps)
    y *= scale.astype(wide)
    if gate is not None:
        y *= ACTIVATIONS[norm.activation](gate.astype(wide))
    return y.astype(norm.dtype)


def rms_norm(
    norm: Norm, places: Places, x: Array, scale: Array, gate: Array | None
) -> Float[Array, "B T *H D"]:
    """`normalized`, whose backward pass is one kernel; keeps x and gate as they came."""
    return _rms_norm(norm, places, *varying((x, scale, gate)))


def rms_norm_and_input(
    norm: Norm, places: Places, x: Array, scale: Array
) -> tuple[Float[Array, "B T *H D"], Float[Array, "B T *H D"]]:
    """The same without a gate, and `x` for what reads it past the norm.

    So the gradients that reach `x` both ways are added up in the kernel.
    """
    return _rms_norm_and_input(norm, places, *varying((x, scale)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rms_norm(norm: Norm, places: Places, x: Array, scale: Array, gate: Array | None) -> Array:
    return normalized(norm, x, scale, gate)


def _norm_forward(
    norm: Norm, places: Places, *inputs: Any
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    return normalized(norm, *inputs), (inputs[0], inputs[1], inputs[2])


def _norm_backward(norm: Norm, places: Places, residuals: Any, d_y: Array) -> tuple[Any, ...]:
    x, scale, gate = residuals
    return _norm_gradients(norm, places, x, scale, gate, d_y, None)[:3]


_rms_norm.defvjp(_norm_forward, _norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rms_norm_and_input(norm: Norm, places: Places, x: Array, scale: Array) -> tuple[Array, Array]:
    return normalized(norm, x, scale, None), x


def _both_forward(
    norm: Norm, places: Places, x: Array, scale: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    return (normalized(norm, x, scale, None), x), (x, scale)


def _both_backward(
    norm: Norm, places: Places, residuals: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Any, ...]:
    return _norm_gradients(norm, places, *residuals, None, *cotangents)[:2]


_rms_norm_and_input.defvjp(_both_forward, _both_backward)


def rms_norm_down(
    norm: Norm,
    places: Places,
    x: Float[Array, "B T HV V"],
    scale: Float[Array, " V"],
    gate: Float[Array, "B T HV V"] | None,
    kernel: Float[Array, "_ hidden"],
) -> Float[Array, "B T hidden"]:
    """`normalized` times `kernel`; the norm is not kept, but made again in the backward pass."""
    return _rms_norm_down(norm, places, *varying((x, scale, gate, kernel)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rms_norm_down(
    norm: Norm, places: Places, x: Array, scale: Array, gate: Array | None, kernel: Array
) -> Array:
    y = normalized(norm, x, scale, gate)
    return y.reshape(*y.shape[:2], -1) @ kernel.astype(y.dtype)


def _down_forward(norm: Norm, places: Places, *inputs: Any) -> tuple[Array, tuple[Any, ...]]:
    return _rms_norm_down(norm, places, *inputs), inputs


def _down_backward(norm: Norm, places: Places, residuals: Any, d_out: Array) -> tuple[Any, ...]:
    x, scale, gate, kernel = residuals
    d_y = (d_out @ kernel.astype(d_out.dtype).T).reshape(x.shape)
    *gradients, y = _norm_gradients(norm, places, x, scale, gate, d_y, None, again=True)
    d_kernel = jnp.einsum("btv,btd->vd", y.reshape(*y.shape[:2], -1), d_out)
    # before the rest of the backward pass, so that the norm is not kept for later
    gradients, d_kernel = lax.optimization_barrier((gradients, d_kernel))
    return *gradients, d_kernel.astype(kernel.dtype)


_rms_norm_down.defvjp(_down_forward, _down_backward)


def _norm_gradients(
    norm: Norm,
    places: Places,
    x: Array,
    scale: Array,
    gate: Array | None,
    d_y: Array,
    d_past: Array | None,
    *,
    again: bool = False,
) -> tuple[Any, ...]:
    """Of x, scale and gate, and the norm if it is asked for."""
    from pallas_kernels import rowwise  # not with the library

    kernel = partial(rowwise.rms_norm_bwd, rowwise.Norm(norm.eps, norm.activation, again))

    def own(tokens: Any, scale: Array) -> tuple[Any, Array]:
        x, gate, d_y, d_past = tokens
        d_x, d_scale, d_gate, y = kernel(x, scale, gate, d_y, d_past)
        return (d_x, d_gate, y), d_scale

    (d_x, d_gate, y), d_scale = _on_devices(own, places, (x, gate, d_y, d_past), scale)
    return d_x, d_scale, d_gate, y


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def swiglu_down(
    places: Places, both: Float[Array, "B T _"], kernel: Float[Array, "F hidden"]
) -> Float[Array, "B T hidden"]:
    """`(silu(gate) * up) @ kernel`; keeps gate and up, and makes the product of both again.

    Args:
      places: where the tokens lie.
      both: gate and up side by side.
      kernel: any float dtype, rounded to that of `both`.
    """
    return _product(both) @ kernel.astype(both.dtype)


def _swiglu_forward(
    places: Places, both: Array, kernel: Array
) -> tuple[Array, tuple[Array, Array]]:
    return swiglu_down(places, both, kernel), (both, kernel)


def _swiglu_backward(
    places: Places, residuals: tuple[Array, Array], d_y: Array
) -> tuple[Array, Array]:
    from pallas_kernels import rowwise  # not with the library

    both, kernel = residuals
    d_product = d_y @ kernel.astype(both.dtype).T

    def own(tokens: Any, _: None) -> tuple[Any, None]:
        return rowwise.swiglu_bwd(*tokens), None

    (d_both, product), _ = _on_devices(own, places, (both, d_product), None)
    d_kernel = jnp.einsum("...f,...d->fd", product, d_y)
    # before the rest of the backward pass, so that the product is not kept for later
    d_both, d_kernel = lax.optimization_barrier((d_both, d_kernel))
    return d_both, d_kernel.astype(kernel.dtype)


swiglu_down.defvjp(_swiglu_forward, _swiglu_backward)


def _product(both: Float[Array, "*B _"]) -> Float[Array, "*B F"]:
    gate, up = jnp.split(both, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _on_devices(
    function: Callable[[Any, Any], tuple[Any, Any]], places: Places, tokens: Any, whole: Any
) -> tuple[Any, Any]:
    """A function on each device's part.

    Args:
      function: of `tokens` and `whole`, to arrays like tokens and arrays that are to be summed over
        all tokens.
      places: where the tokens lie.
      tokens: arrays `[B, T, ...]`, `[B, T, HV, ...]` where they have four dimensions.
      whole: arrays that every device has.
    """
    rows, time, heads = (axes or None for axes in places.cuts)
    if rows is None and time is None and heads is None:
        return function(tokens, whole)
    axes = sum(places.cuts, ())

    def spec(x: Array) -> PartitionSpec:
        return PartitionSpec(rows, time, heads) if x.ndim == 4 else PartitionSpec(rows, time)

    def own(tokens: Any, whole: Any) -> tuple[Any, Any]:
        results, sums = function(tokens, varying(whole, tokens))
        return results, jax.tree.map(lambda x: lax.psum(x, axes), sums)

    like = jax.tree.leaves(tokens)[0]
    return jax.shard_map(
        own,
        in_specs=(jax.tree.map(spec, tokens), PartitionSpec()),
        out_specs=(spec(like), PartitionSpec()),
        axis_names=places.axes,
        check_vma=types_are_checked(tokens),
    )(tokens, whole)


def losses_and_gradient(
    logits: Float[Array, "B T aligned"],
    targets: Array,
    *,
    vocab: int,
    ignored: int,
    unknown: int,
    dtype: jax.typing.DTypeLike,
) -> tuple[Float[Array, "B T"], Float[Array, "B T aligned"]]:
    """Cross entropy of every token and its gradient by the logits, by one kernel.

    Args:
      logits: float32, meaningless behind `vocab`.
      targets: int32 tokens, `ignored` or `unknown`.
      vocab: size of the vocabulary.
      ignored: a target whose loss and gradient are zero.
      unknown: a target whose loss and gradient are nan.
      dtype: of the gradient.
    """
    from pallas_kernels.rowwise import cross_entropy_fwd  # not with the library

    rows = math.prod(targets.shape)
    losses, gradient = cross_entropy_fwd(
        logits.reshape(rows, -1),
        targets.reshape(rows),
        vocab=vocab,
        ignored=ignored,
        unknown=unknown,
        dtype=dtype,
    )
    return losses.reshape(targets.shape), gradient.reshape(logits.shape)
