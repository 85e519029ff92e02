"""Short causal depthwise convolution with a cache."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mdn_jax.layers.sharding import by_rows_and_channels
from mdn_jax.ops import api
from mdn_jax.ops.inputs import document_starts

ConvImplementation = Literal["xla", "pallas_triton"]
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
        implementation: ConvImplementation | None = None,
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

    def tail_after(
        self, x: Batch, tail: Tail, starts: Bool[Array, "B T"] | None, lengths: Array | None
    ) -> Tail:
        """The last `W` inputs of each row's last document, of inputs in the compute dtype."""
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
    inputs: Sequence[Batch],
    tails: Sequence[Tail],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
) -> list[tuple[Batch, Tail]]:
    """Convolutions of the same tokens: one launch where the kernel runs.

    Args:
      convs: of the same size, dtype and implementation.
      inputs: of each.
      tails: as of `ShortConv`, of each.
      segment_ids: as of `ShortConv`.
      lengths: as of `ShortConv`.

    Returns:
      What each of `convs` returns.

    Raises:
      ValueError: an implementation that does not support the call.
    """
    dtype = convs[0].dtype
    inputs, tails = ([x.astype(dtype) for x in arrays] for arrays in (inputs, tails))
    starts = None
    if segment_ids is not None:
        starts = document_starts(segment_ids, (inputs[0].shape[0], inputs[0].shape[1]))
    arguments = [
        (x, tail, conv.kernel[...], None if conv.bias is None else conv.bias[...])
        for conv, x, tail in zip(convs, inputs, tails, strict=True)
    ]
    if _chosen(convs[0].implementation, arguments) == "xla":
        outputs = tuple(xla_convolution(*arrays, starts) for arrays in arguments)
    else:
        outputs = by_rows_and_channels(_on_kernels, arguments, starts)
    return [
        (y, conv.tail_after(x, tail, starts, lengths))
        for conv, x, tail, y in zip(convs, inputs, tails, outputs, strict=True)
    ]


Arguments = tuple[Batch, Tail, Float[Array, "W channels"], Float[Array, " channels"] | None]
"""Inputs, tail, taps and bias of a convolution."""


def _chosen(
    implementation: ConvImplementation | None, arguments: Sequence[Arguments]
) -> ConvImplementation:
    if implementation == "xla":
        return implementation
    from pallas_kernels.short_convolution import MIN_STEPS, unsupported  # not with the library

    x, _, taps, _ = arguments[0]
    lacking = unsupported(x, taps, api._capability())
    if implementation is None:
        return "xla" if lacking or x.shape[1] < MIN_STEPS else "pallas_triton"
    if lacking:
        raise ValueError(
            f'implementation: "pallas_triton" expects {lacking}; use "xla", or None for the best '
            "one that supports the call"
        )
    return implementation


def _on_kernels(
    arguments: Sequence[Arguments], starts: Bool[Array, "B T"] | None
) -> tuple[Batch, ...]:
    from pallas_kernels.short_convolution import Branch, short_convolution  # not with the library

    branches = [
        Branch(x, tail[:, 1:] if tail.shape[1] > 1 else None, taps, bias)
        for x, tail, taps, bias in arguments
    ]
    return short_convolution(tuple(branches), starts)


@jax.custom_vjp
def xla_convolution(
    x: Float[Array, "B T channels"],
    tail: Float[Array, "B W channels"],
    kernel: Float[Array, "W channels"],
    bias: Float[Array, " channels"] | None,
    starts: Bool[Array, "B T"] | None,
) -> Float[Array, "B T channels"]:
    """The convolution and silu; reverse mode keeps the inputs as they came, and the sum of taps."""
    return jax.nn.silu(_sum_of_taps(x, tail, kernel, bias, starts))


def _forward(*inputs: Any) -> tuple[Array, tuple[tuple[Any, ...], Array]]:
    total = _sum_of_taps(*inputs)
    return jax.nn.silu(total), (inputs, total)


def _backward(
    residuals: tuple[tuple[Any, ...], Array], d_y: Float[Array, "B T channels"]
) -> tuple[Any, ...]:
    """By hand: what transposing the sum of taps gives takes 1.4 to 2.4 times as long on a CPU."""
    # without it XLA keeps them widened
    residuals, d_y = jax.lax.optimization_barrier((residuals, d_y))
    (x, tail, kernel, bias, starts), total = residuals
    size = kernel.shape[0]
    _, pull = jax.vjp(jax.nn.silu, total)
    d_sum = pull(d_y)[0]
    wide = jnp.promote_types(x.dtype, jnp.float32)

    # an input is seen by its own step and by the W - 1 after it, the last of which T has not
    reach = ((0, 0), (size, size - 1))
    sums = jnp.pad(d_sum, (*reach, (0, 0)))
    d_inputs = jnp.zeros((), wide)  # of tail and x
    for tap, own in enumerate(_own_document(starts, size)):
        steps = slice(size - 1 - tap, 2 * size - 1 - tap + x.shape[1])
        seen = sums[:, steps].astype(wide) * kernel[tap].astype(wide)
        if own is not None:
            seen = jnp.where(jnp.pad(own, reach)[:, steps, None], seen, 0.0)
        d_inputs += seen
    d_inputs = d_inputs.astype(x.dtype)

    d_sum = d_sum.astype(wide)
    d_kernel = jnp.stack(
        [jnp.sum(tap * d_sum, axis=(0, 1)) for tap in _taps(x, tail, size, starts, wide)]
    ).astype(kernel.dtype)
    d_bias = None if bias is None else jnp.sum(d_sum, axis=(0, 1)).astype(bias.dtype)
    return d_inputs[:, size:], d_inputs[:, :size], d_kernel, d_bias, None


xla_convolution.defvjp(_forward, _backward)


def _sum_of_taps(
    x: Array, tail: Array, kernel: Array, bias: Array | None, starts: Array | None
) -> Float[Array, "B T channels"]:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    kernel = kernel.astype(wide)
    y = jnp.zeros((), wide) if bias is None else bias.astype(wide)
    for tap, inputs in enumerate(_taps(x, tail, kernel.shape[0], starts, wide)):
        y += inputs * kernel[tap]
    return y.astype(x.dtype)


def _taps(
    x: Array, tail: Array, size: int, starts: Array | None, dtype: jax.typing.DTypeLike
) -> Iterator[Float[Array, "B T channels"]]:
    """What each tap sees at every step: zero across the start of a document."""
    length = x.shape[1]
    inputs = jnp.concatenate([tail, x], axis=1)  # W + T
    for tap, own in enumerate(_own_document(starts, size)):
        seen = inputs[:, tap + 1 : tap + 1 + length].astype(dtype)
        yield seen if own is None else jnp.where(own[:, :, None], seen, 0.0)


def _own_document(starts: Bool[Array, "B T"] | None, size: int) -> list[Bool[Array, "B T"] | None]:
    """For each tap the steps whose own document it sees: none starts after it; None: all steps.

    The tail before the first step belongs to the row's first document.
    """
    if starts is None:
        return [None] * size
    own: list[Array | None] = [None]  # the current token's own tap
    for distance in range(1, size):
        late = jnp.pad(starts, ((0, 0), (distance - 1, 0)))[:, : starts.shape[1]]
        own.append(~late if own[-1] is None else own[-1] & ~late)
    return own[::-1]
