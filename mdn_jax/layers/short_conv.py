"""Short causal depthwise convolution with a cache."""

from collections.abc import Sequence
from itertools import accumulate

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mdn_jax.layers.sharding import by_rows_and_channels
from mdn_jax.ops.context import varying
from mdn_jax.ops.inputs import document_starts
from mdn_jax.ops.short_convolution import (
    Convolution,
    ConvolutionImplementation,
    chosen,
    kernel_convolutions,
    xla_convolution,
)

Batch = Float[Array, "B T channels"]
Tail = Float[Array, "B W channels"]


class ShortConv(nnx.Module):
    """Causal depthwise convolution over time, then silu.

    Tap `size - 1` is the current token. No tap reads across the start of a document.

    Args:
      channels: width of input and output.
      size: taps `W`.
      use_bias: a bias per channel, initially zero.
      initializer_range: standard deviation of the taps.
      implementation: "xla"; "pallas_triton", a kernel for CUDA GPUs (up to 8 taps; float32,
        bfloat16, float16; its derivatives are of the first order); or None: the kernel where it
        supports the call and there are at least 16 steps.
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
        implementation: ConvolutionImplementation | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.size = size
        self.implementation = implementation
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
          segment_ids: document of each step; one starts where they change.
          lengths: steps of each row that count, those before its padding; None: all.

        Returns:
          The outputs, and the last `W` inputs of the row's last document, zeros on the left.
        """
        ((y, tail),) = short_convolutions(
            (self,), (x,), (tail,), segment_ids=segment_ids, lengths=lengths
        )
        return y, tail

    def chosen(self, x: Float[Array, "B T _"]) -> ConvolutionImplementation:
        """What runs it, of inputs of this shape and dtype.

        Raises:
          ValueError: an implementation that does not support the call.
        """
        return chosen(self.implementation, x, self.kernel[...])

    def tail_after(
        self, x: Batch, tail: Tail, starts: Bool[Array, "B T"] | None, lengths: Array | None
    ) -> Tail:
        """The last `W` inputs of each row's last document, of inputs in the compute dtype."""
        if lengths is not None and x.shape[1] == 1:  # no gather where one token is decoded
            shifted = jnp.concatenate([tail[:, 1:], x], axis=1)
            return jnp.where((lengths > 0)[:, None, None], shifted, tail)
        if lengths is not None:  # the W inputs up to step `lengths` of tail and inputs
            steps = lengths[:, None] + jnp.arange(self.size)
            inputs = jnp.concatenate([tail, x], axis=1)
            return jnp.take_along_axis(inputs, steps[:, :, None], axis=1)
        tail = jnp.concatenate([tail, x[:, -self.size :]], axis=1)[:, -self.size :]
        if starts is not None:
            last = jnp.pad(starts, ((0, 0), (self.size, 0)))[:, -self.size :]
            after = jnp.cumsum(last[:, ::-1], axis=1)[:, ::-1] - last  # documents that start later
            tail = jnp.where((after == 0)[:, :, None], tail, 0.0)
        return tail


def short_convolutions(
    convs: Sequence[ShortConv],
    inputs: Sequence[Batch] | Batch,
    tails: Sequence[Tail],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
) -> list[tuple[Batch, Tail]]:
    """Convolutions of the same tokens: one launch where the kernel runs.

    Args:
      convs: of the same size, dtype and implementation.
      inputs: of each; or one array of them along the channels, which the kernel reads as it lies.
      tails: as of `ShortConv`, of each.
      segment_ids: as of `ShortConv`.
      lengths: as of `ShortConv`.

    Returns:
      What each of `convs` returns.

    Raises:
      ValueError: an implementation that does not support the call.
    """
    dtype = convs[0].dtype
    # a cache that was made here is the same on all devices of a shard_map
    inputs, tails = varying(jax.tree.map(lambda x: x.astype(dtype), (inputs, list(tails))))
    joined = inputs if isinstance(inputs, jax.Array) else None
    if joined is not None:
        ends = accumulate(conv.kernel.shape[1] for conv in convs)
        inputs = jnp.split(joined, list(ends)[:-1], axis=2)
    starts = None
    if segment_ids is not None:
        starts = document_starts(segment_ids, (inputs[0].shape[0], inputs[0].shape[1]))
    arguments = [
        Convolution(x, tail, conv.kernel[...], None if conv.bias is None else conv.bias[...])
        for conv, x, tail in zip(convs, inputs, tails, strict=True)
    ]
    if convs[0].chosen(inputs[0]) == "xla":
        outputs = tuple(xla_convolution(*arrays, starts) for arrays in arguments)
    else:
        if joined is not None:
            arguments = [arrays._replace(x=None) for arrays in arguments]
        outputs = by_rows_and_channels(kernel_convolutions, (joined, arguments), starts)
    return [
        (y, conv.tail_after(x, tail, starts, lengths))
        for conv, x, tail, y in zip(convs, inputs, tails, outputs, strict=True)
    ]
