"""The short convolution as a function: XLA's code, and the GPU kernel behind the same arguments."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mdn_jax.ops import api

ConvolutionImplementation = Literal["xla", "pallas_triton"]


class Convolution(NamedTuple):
    """The arrays of one.

    Attributes:
      x: inputs; None: they are in the joined ones of several.
      tail: the last `W` inputs before `x`, of which `W - 1` are seen; x's dtype.
      taps: any float dtype; tap `W - 1` is the current step.
      bias: any float dtype; None: none.
    """

    x: Float[Array, "B T channels"] | None
    tail: Float[Array, "B W channels"]
    taps: Float[Array, "W channels"]
    bias: Float[Array, " channels"] | None


def chosen(
    implementation: ConvolutionImplementation | None,
    x: Float[Array, "B T channels"],
    taps: Float[Array, "W channels"],
) -> ConvolutionImplementation:
    """What runs a convolution of these inputs.

    Raises:
      ValueError: the kernel, which does not support it.
    """
    capability = api._capability()
    if implementation == "xla" or (implementation is None and capability is None):
        return "xla"
    from pallas_kernels.short_convolution import MIN_STEPS, unsupported  # not with the library

    lacking = unsupported(x, taps, capability)
    if implementation is None:
        return "xla" if lacking or x.shape[1] < MIN_STEPS else "pallas_triton"
    if lacking:
        raise ValueError(
            f'implementation: "pallas_triton" expects {lacking}; use "xla", or None for the best '
            "one that supports the call"
        )
    return implementation


def kernel_convolutions(
    arguments: tuple[Float[Array, "B T _"] | None, Sequence[Convolution]],
    starts: Bool[Array, "B T"] | None,
) -> tuple[Float[Array, "B T channels"], ...]:
    """Outputs of each convolution, of equal `B`, `T` and `W`, in one launch.

    Args:
      arguments: the inputs of all along the channels, or None; and the convolutions.
      starts: first steps of documents.
    """
    from pallas_kernels.short_convolution import Branch, short_convolution  # not with the library

    joined, convolutions = arguments
    branches = [
        Branch(x, tail[:, 1:] if tail.shape[1] > 1 else None, taps, bias)
        for x, tail, taps, bias in convolutions
    ]
    return short_convolution(tuple(branches), starts, joined=joined)


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
