"""Cross entropy from hidden states, without the logits of all tokens at once.

Logits are the widest array of a model by far: 1.6 GB in float32 for 8,192 tokens and the vocabulary
of GPT-2. Here some of the tokens at a time have theirs, and what the backward pass would do with
them is done at once, so that they are computed once and never kept: three products for each part of
the tokens, as many as with logits that are kept.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from mdn_jax.layers.explicit import automatically
from mdn_jax.layers.sharding import cut, named_axes, partitioned
from mdn_jax.ops.arguments import outside
from mdn_jax.ops.context import varying
from mdn_jax.ops.on_mesh import Cuts, axes_of, explicit_axes, explicit_mesh, types_are_checked
from mdn_jax.ops.rowwise import losses_and_gradient, on_kernels

IGNORED = -100
"""A target that does not count."""
LOGIT_BYTES = 2**30
"""Most bytes of the float32 logits that a device holds at once."""
_UNKNOWN = -1
"""Stands for every target that is neither a token nor `IGNORED`."""
ALIGNMENT = 64
"""The vocabulary is filled up to a multiple of this: products of other widths are slow on GPUs."""


def summed_loss(
    h: Float[Array, "B T hidden"],
    kernel: Float[Array, "hidden vocab"],
    targets: ArrayLike,
    *,
    parts: int | None = None,
) -> Float[Array, ""]:
    """Cross entropy summed over the targets that are not -100; one that is no token makes it nan.

    The products are in `h`'s dtype, accumulated in float32, as are the logits, the loss and the sum
    of the kernel's gradient; the gradient of the logits is rounded to `h`'s dtype. Float64 `h`:
    all in float64. Under a mesh (see `mdn_jax.layers.sharding`) the rows are cut over `data` and
    `fsdp`, the tokens of a row over `context` and `tensor`, and every device has the whole kernel
    in `h`'s dtype. On arrays of Explicit axes the loss is on every device.

    Args:
      h: hidden states in the compute dtype.
      kernel: of the output projection, any float dtype; its gradient has the same.
      targets: next tokens, `[B, T]`, any integer dtype; -100 where none is counted, any other id
        outside the vocabulary gives nan, in the gradients as well.
      parts: how many parts the tokens of a device are computed in; None: at least two, and as many
        as keep their logits below `LOGIT_BYTES`.

    Returns:
      The sum, nats, float32 (float64 for float64).

    Raises:
      TypeError: targets that are no integers.
    """
    if (mesh := explicit_mesh((h, kernel))) is not None:
        sizes = explicit_axes(mesh)
        cuts = Cuts(rows=axes_of([h], 0, sizes), time=axes_of([h], 1, sizes))
        loss = partial(summed_loss, parts=parts)
        return automatically(loss, cuts, PartitionSpec(), h, kernel, targets)
    arrays = varying((h, kernel, _as_targets(targets, kernel.shape[1])))
    return _summed(parts, *arrays)


def token_losses(
    h: Float[Array, "B T hidden"],
    kernel: Float[Array, "hidden vocab"],
    targets: ArrayLike,
    *,
    parts: int | None = None,
) -> Float[Array, "B T"]:
    """The cross entropy of each target, 0 where it is -100; arguments as `summed_loss`'s.

    Not to be differentiated: the logits of all tokens would be kept.
    """
    targets = _as_targets(targets, kernel.shape[1])
    length, vocab = targets.shape[1], kernel.shape[1]
    kernel = _aligned(kernel.astype(h.dtype))
    parts = parts or _parts(h.shape[0], length, vocab)
    losses = lax.map(
        lambda x: _losses(x[0], x[1], kernel, vocab)[0], _cut_time((h, targets), parts)
    )
    return _join_time(losses, length)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(parts: int | None, h: Array, kernel: Array, targets: Array) -> Array:
    def local(h: Array, kernel: Array, targets: Array) -> Array:
        return jnp.sum(token_losses(h, kernel, targets, parts=parts))

    return _on_devices(local, False, h, kernel, targets)


def _summed_forward(
    parts: int | None, h: Array, kernel: Array, targets: Array
) -> tuple[Array, tuple[Array, Array]]:
    local = partial(_loss_and_gradients, parts)
    loss, d_h, d_kernel = _on_devices(local, True, h, kernel, targets)
    return loss, (d_h, d_kernel.astype(kernel.dtype))


def _summed_backward(
    parts: int | None, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array, None]:
    d_h, d_kernel = ((x * cotangent).astype(x.dtype) for x in residuals)
    return d_h, d_kernel, None


_summed.defvjp(_summed_forward, _summed_backward)


def _on_devices(local: Any, gradients: bool, h: Array, kernel: Array, targets: Array) -> Any:
    """`local` on each device's tokens; its loss, and its gradient of the kernel, added up."""
    kernel = kernel.astype(h.dtype)  # before the devices gather it
    names = named_axes()
    rows, time = cut(names.rows, targets.shape[0]), cut(names.time + names.heads, targets.shape[1])
    axes = (*(rows or ()), *(time or ()))
    if not axes:
        return local(h, kernel, targets)
    tokens, whole = PartitionSpec(rows, time), PartitionSpec()

    def add_up(*arrays: Array) -> Any:
        if not gradients:
            return lax.psum(local(*arrays), axes)
        loss, d_h, d_kernel = local(*arrays)
        return lax.psum(loss, axes), d_h, lax.psum(d_kernel, axes)

    return jax.shard_map(
        add_up,
        in_specs=(tokens, whole, tokens),
        out_specs=(whole, tokens, whole) if gradients else whole,
        axis_names=frozenset(partitioned()),
        check_vma=types_are_checked(h),
    )(h, kernel, targets)


def _loss_and_gradients(
    parts: int | None, h: Array, kernel: Array, targets: Array
) -> tuple[Array, Array, Array]:
    """The sum and its derivatives: by `h` in its dtype, by the kernel in float32."""
    wide = jnp.promote_types(h.dtype, jnp.float32)
    length, vocab = targets.shape[1], kernel.shape[1]
    kernel = _aligned(kernel)
    parts = parts or _parts(h.shape[0], length, vocab)

    def add(carry: tuple[Array, Array], part: tuple[Array, Array]) -> tuple[Any, Array]:
        loss, d_kernel = carry
        h, targets = part
        losses, d_logits = _losses_and_d_logits(h, targets, kernel, vocab)
        d_h = jnp.einsum("btv,dv->btd", d_logits, kernel)
        d_kernel += jnp.einsum("btd,btv->dv", h, d_logits, preferred_element_type=wide)
        return (loss + jnp.sum(losses), d_kernel), d_h

    zeros = jnp.zeros((), wide), jnp.zeros(kernel.shape, wide)
    # inside shard_map they differ over the mesh axes that the tokens differ over
    axes = tuple(jax.typeof(h).manual_axis_type.varying)
    zeros = jax.tree.map(lambda x: lax.pcast(x, axes, to="varying"), zeros)
    (loss, d_kernel), d_h = lax.scan(add, zeros, _cut_time((h, targets), parts))
    return loss, _join_time(d_h, length), d_kernel[:, :vocab]


def _as_targets(targets: ArrayLike, vocab: int) -> Int[Array, "B T"]:
    """The targets as int32: tokens, `IGNORED`, and one value for all that is neither."""
    ids: Any = targets if isinstance(targets, jax.Array) else np.asarray(targets)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"targets: expected an integer dtype, got {ids.dtype.name}")
    unknown = outside(ids, vocab)
    if jnp.issubdtype(ids.dtype, jnp.signedinteger):
        unknown &= ids != IGNORED
    return jnp.where(unknown, _UNKNOWN, ids.astype(np.int32))


def _aligned(kernel: Float[Array, "hidden vocab"]) -> Float[Array, "hidden _"]:
    return jnp.pad(kernel, ((0, 0), (0, -kernel.shape[1] % ALIGNMENT)))


def _losses(
    h: Float[Array, "B t hidden"],
    targets: Int[Array, "B t"],
    kernel: Float[Array, "hidden aligned"],
    vocab: int,
) -> tuple[Float[Array, "B t"], Float[Array, "B t aligned"], Float[Array, "B t"]]:
    """Losses of `_as_targets`'s, logits and the logarithm of the sum of their exponentials.

    The logits of ids above the vocabulary are -inf; the logarithm is nan where the target is
    `_UNKNOWN`, and with it everything that is made of it.
    """
    wide = jnp.promote_types(h.dtype, jnp.float32)
    logits = jnp.matmul(h, kernel, preferred_element_type=wide)
    if vocab < kernel.shape[1]:
        inside = lax.broadcasted_iota(jnp.int32, logits.shape, 2) < vocab
        logits = jnp.where(inside, logits, -jnp.inf)
    total = jnp.where(targets == _UNKNOWN, jnp.nan, jax.nn.logsumexp(logits, axis=-1))
    index = jnp.maximum(targets, 0)[:, :, None]
    at_target = jnp.take_along_axis(logits, index, axis=-1)[:, :, 0]
    return jnp.where(targets == IGNORED, 0.0, total - at_target), logits, total


def _losses_and_d_logits(
    h: Float[Array, "B t hidden"],
    targets: Int[Array, "B t"],
    kernel: Float[Array, "hidden aligned"],
    vocab: int,
) -> tuple[Float[Array, "B t"], Float[Array, "B t aligned"]]:
    """Losses as of `_losses`, and their gradient by the logits in `h`'s dtype."""
    if on_kernels(h):
        logits = jnp.matmul(h, kernel, preferred_element_type=jnp.float32)
        return losses_and_gradient(
            logits, targets, vocab=vocab, ignored=IGNORED, unknown=_UNKNOWN, dtype=h.dtype
        )
    losses, logits, total = _losses(h, targets, kernel, vocab)
    hot = lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[:, :, None]
    d_logits = jnp.exp(logits - total[:, :, None]) - hot
    d_logits = jnp.where(targets[:, :, None] == IGNORED, 0.0, d_logits).astype(h.dtype)
    return losses, d_logits


def _parts(rows: int, length: int, vocab: int) -> int:
    """A divisor of the length if there is one not far above what the bytes ask for."""
    least = min(length, max(2, math.ceil(rows * length * vocab * 4 / LOGIT_BYTES)))
    return next((n for n in range(least, 2 * least) if length % n == 0), least)


def _cut_time(arrays: Any, parts: int) -> Any:
    """`[B, T, ...]` to `[parts, B, T / parts, ...]`; steps without a target fill the last part."""

    def split(x: Array, fill: float) -> Array:
        rows, length = x.shape[:2]
        margin = [(0, 0), (0, -length % parts)] + [(0, 0)] * (x.ndim - 2)
        if length % parts:
            x = jnp.pad(x, margin, constant_values=fill)
        return jnp.moveaxis(x.reshape(rows, parts, -1, *x.shape[2:]), 1, 0)

    h, targets = arrays
    return split(h, 0), split(targets, IGNORED)


def _join_time(x: Array, length: int) -> Array:
    """The way back from `_cut_time`."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]
