"""Short causal depthwise convolution with a cache."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


class ShortConv(nnx.Module):
    """Causal depthwise convolution over time, then silu.

    Tap `size - 1` is the current token. No tap reads across the start of a document.

    Args:
      channels: width of input and output.
      size: taps `W`.
      use_bias: a bias per channel, initially zero.
      initializer_range: standard deviation of the taps.
      dtype: of input and output; the sum over taps is float32 (float64 for float64).
      param_dtype: of the parameters.
      rngs: random keys for the initialisation, stream `params`.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        *,
        use_bias: bool = False,
        initializer_range: float = 0.02,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.size = size
        self.dtype = dtype
        normal = jax.nn.initializers.normal(initializer_range)
        self.kernel = nnx.Param(normal(rngs.params(), (size, channels), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype)) if use_bias else None

    def init_cache(self, batch_size: int) -> Float[Array, "B W channels"]:
        """The inputs before the first token: zeros."""
        return jnp.zeros((batch_size, *self.kernel.shape), self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T channels"],
        tail: Float[Array, "B W channels"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T channels"], Float[Array, "B W channels"]]:
        """Convolves `x`.

        Args:
          x: inputs.
          tail: the last `W` inputs before `x`, oldest first, of the row's first document.
          segment_ids: document of each step, non-decreasing along `T`.
          lengths: steps of each row that count, those before its padding; None: all.

        Returns:
          The outputs, and the last `W` inputs of the row's last document, zeros on the left.
        """
        x, tail = x.astype(self.dtype), tail.astype(self.dtype)
        bias = None if self.bias is None else self.bias[...]
        y = _convolve(x, tail, self.kernel[...], bias, segment_ids)

        if lengths is not None:  # the W inputs up to step `lengths` of tail and inputs
            steps = lengths[:, None] + jnp.arange(self.size)
            inputs = jnp.concatenate([tail, x], axis=1)
            return y, jnp.take_along_axis(inputs, steps[:, :, None], axis=1)
        tail = jnp.concatenate([tail, x[:, -self.size :]], axis=1)[:, -self.size :]
        if segment_ids is not None:
            ids = _with_tail(segment_ids, self.size)[:, -self.size :, None]
            tail = jnp.where(ids == ids[:, -1:], tail, 0.0)
        return y, tail


@jax.custom_vjp
def _convolve(
    x: Float[Array, "B T channels"],
    tail: Float[Array, "B W channels"],
    kernel: Float[Array, "W channels"],
    bias: Float[Array, " channels"] | None,
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T channels"]:
    """The convolution and silu; reverse mode keeps the inputs as they came, and the sum of taps."""
    return jax.nn.silu(_sum_of_taps(x, tail, kernel, bias, segment_ids))


def _forward(*inputs: Any) -> tuple[Array, tuple[tuple[Any, ...], Array]]:
    total = _sum_of_taps(*inputs)
    return jax.nn.silu(total), (inputs, total)


def _backward(
    residuals: tuple[tuple[Any, ...], Array], d_y: Float[Array, "B T channels"]
) -> tuple[Any, ...]:
    """By hand: what transposing the sum of taps gives takes 1.4 to 2.4 times as long on a CPU."""
    # without it XLA keeps them widened
    residuals, d_y = jax.lax.optimization_barrier((residuals, d_y))
    (x, tail, kernel, bias, segment_ids), total = residuals
    size = kernel.shape[0]
    _, pull = jax.vjp(jax.nn.silu, total)
    d_sum = pull(d_y)[0]
    wide = jnp.promote_types(x.dtype, jnp.float32)

    # an input is seen by its own step and by the W - 1 after it, the last of which T has not
    reach = ((0, 0), (size, size - 1))
    sums = jnp.pad(d_sum, (*reach, (0, 0)))
    ids = None if segment_ids is None else jnp.pad(segment_ids, reach, mode="edge")
    d_inputs = jnp.zeros((), wide)  # of tail and x
    for tap in range(size):
        steps = slice(size - 1 - tap, 2 * size - 1 - tap + x.shape[1])
        seen = sums[:, steps].astype(wide) * kernel[tap].astype(wide)
        if ids is not None and tap < size - 1:
            same = ids[:, steps] == ids[:, : 1 - size]
            seen = jnp.where(same[:, :, None], seen, 0.0)
        d_inputs += seen
    d_inputs = d_inputs.astype(x.dtype)

    d_sum = d_sum.astype(wide)
    d_kernel = jnp.stack(
        [jnp.sum(tap * d_sum, axis=(0, 1)) for tap in _taps(x, tail, size, segment_ids, wide)]
    ).astype(kernel.dtype)
    d_bias = None if bias is None else jnp.sum(d_sum, axis=(0, 1)).astype(bias.dtype)
    return d_inputs[:, size:], d_inputs[:, :size], d_kernel, d_bias, None


_convolve.defvjp(_forward, _backward)


def _sum_of_taps(
    x: Array, tail: Array, kernel: Array, bias: Array | None, segment_ids: Array | None
) -> Float[Array, "B T channels"]:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    kernel = kernel.astype(wide)
    y = jnp.zeros((), wide) if bias is None else bias.astype(wide)
    for tap, inputs in enumerate(_taps(x, tail, kernel.shape[0], segment_ids, wide)):
        y += inputs * kernel[tap]
    return y.astype(x.dtype)


def _taps(
    x: Array, tail: Array, size: int, segment_ids: Array | None, dtype: jax.typing.DTypeLike
) -> Iterator[Float[Array, "B T channels"]]:
    """What each tap sees at every step: zero across the start of a document."""
    length = x.shape[1]
    inputs = jnp.concatenate([tail, x], axis=1)  # W + T
    for tap in range(size):
        steps = slice(tap + 1, tap + 1 + length)
        seen = inputs[:, steps].astype(dtype)
        if segment_ids is not None and tap < size - 1:
            same = _with_tail(segment_ids, size)[:, steps] == segment_ids
            seen = jnp.where(same[:, :, None], seen, 0.0)
        yield seen


def _with_tail(segment_ids: Int[Array, "B T"], size: int) -> Int[Array, "B T+W"]:
    """Segment ids of the tail and the inputs: the tail belongs to the row's first document."""
    return jnp.pad(segment_ids, ((0, 0), (size, 0)), mode="edge")
