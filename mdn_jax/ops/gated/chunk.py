"""What the chunk algorithm of the gated rules needs of each chunk; nothing divides or cancels.

Every exponent is a sum of non-positive log-gates over one segment of time. A decay of each key
channel cannot be taken out of the product of queries and keys; there the chunk is halved again and
again, and the factor between a row of the second half and a column of the first is split at the
boundary between them, so that both parts are at most 1.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mdn_jax.ops.coefficients import LOG_ZERO, segment_sums
from mdn_jax.ops.gated.inputs import GatedInputs

_DIRECT = 8  # steps of a block whose decays are taken for each pair and channel


class Chunk(NamedTuple):
    """A chunk's part in the recurrence of its states; local time `1..C`, heads before time.

    U   = (I + lower)^-1 (V - read S)      (V itself without the delta rule)
    S_C = keep S + write^T U
    O   = query S + attention U
    """

    lower: Float[Array, "*h C C"] | None  # strictly lower triangular; None: no delta rule
    read: Float[Array, "*h C K"] | None
    write: Float[Array, "*h C K"]
    keep: Float[Array, "*h K 1"]  # or [*h, 1, 1]
    query: Float[Array, "*h C K"]
    attention: Float[Array, "*h C C"]  # lower triangular


def prepare_chunk(x: GatedInputs, *, delta: bool, precision: lax.Precision) -> Chunk:
    """The chunk's matrices.

    Args:
      x: inputs with heads before time: `q, k` `[*b, H, 1, C, K]`, `v` `[*b, H, G, C, V]`, gates
        `[*b, H, G, C]` (or `[*b, H, G, C, K]`), `p` `[*b, H, P, C, K]`, `starts` `[*b, C]`. `p` and
        `own` are of rules with a decay of each head, `erase` is of those with one of each channel.
      delta: with the delta rule.
      precision: of the products with K-sized operands; decays are always exact.
    """
    document = jnp.cumsum(x.starts, axis=-1)[..., None, None, :]
    same = document[..., :, None] == document[..., None, :]
    first = document == 0  # the document that the entering states belong to
    last = document == document[..., -1:]
    make = _by_channel if x.by_channel else _by_head
    return make(x, same=same, first=first, last=last, delta=delta, precision=precision)


def _by_head(
    x: GatedInputs,
    *,
    same: Array,
    first: Array,
    last: Array,
    delta: bool,
    precision: lax.Precision,
) -> Chunk:
    matmul = partial(jnp.matmul, precision=precision)
    log_alpha = jnp.maximum(x.log_alpha, LOG_ZERO)
    index = jnp.arange(log_alpha.shape[-1])
    seen = index[:, None] >= index[None, :]
    decays = jnp.exp(segment_sums(log_alpha, seen)) * (seen & same)  # from after j through t
    decay = jnp.exp(jnp.cumsum(log_alpha, axis=-1)) * first
    keys = jnp.swapaxes(x.k, -1, -2)
    lower = read = None
    if delta and x.p is None:  # alpha k: the decay goes through the step itself
        lower = jnp.tril(matmul(x.k, keys) * decays, -1)
        read = decay[..., None] * x.k
    elif delta:
        assert x.p is not None
        before = (*((0, 0),) * (decays.ndim - 2), (1, 0))  # one step earlier
        earlier = jnp.pad(decays[..., :-1, :], (*before, (0, 0))) * same
        lower = jnp.tril(matmul(x.p, keys) * earlier, -1)
        read = jnp.pad(decay[..., :-1], before, constant_values=1)[..., None] * x.p
        read *= first[..., None]
    to_end = x.beta * decays[..., -1, :]
    products = matmul(x.q, keys) * decays
    attention = products * x.beta[..., None, :]
    if x.own is not None:
        attention = jnp.where(
            jnp.eye(len(index), dtype=bool), products * x.own[..., None], attention
        )
    return Chunk(
        lower=None if lower is None else lower * x.beta[..., None, :],
        read=read,
        write=to_end[..., None] * x.k,
        keep=decay[..., -1, None, None],
        query=decay[..., None] * x.q,
        attention=attention,
    )


def _by_channel(
    x: GatedInputs,
    *,
    same: Array,
    first: Array,
    last: Array,
    delta: bool,
    precision: lax.Precision,
) -> Chunk:
    log_alpha = jnp.maximum(x.log_alpha, LOG_ZERO)
    decay = jnp.exp(jnp.cumsum(log_alpha, axis=-2)) * first[..., None]
    erase = x.k if x.erase is None else x.erase
    rows = jnp.stack(jnp.broadcast_arrays(x.q, erase)) if delta else x.q[None]
    products = _decayed_products(rows, x.k, log_alpha, precision)
    products = jnp.where(same, products, 0) * x.beta[..., None, :]
    to_end = jnp.exp(_sums_after(log_alpha)) * last[..., None]
    return Chunk(
        lower=jnp.tril(products[1], -1) if delta else None,
        read=decay * erase if delta else None,
        write=x.beta[..., None] * to_end * x.k,
        keep=decay[..., -1, :, None],
        query=decay * x.q,
        attention=products[0],
    )


def _sums_after(steps: Float[Array, "*h C K"]) -> Float[Array, "*h C K"]:
    """Sum over the later steps, the step itself left out."""
    later = jnp.pad(steps[..., 1:, :], (*((0, 0),) * (steps.ndim - 2), (0, 1), (0, 0)))
    return lax.cumsum(later, axis=steps.ndim - 2, reverse=True)


def _decayed_products(
    rows: Float[Array, "*r C K"],
    keys: Float[Array, "*#h C K"],
    log_alpha: Float[Array, "*h C K"],
    precision: lax.Precision,
) -> Float[Array, "*r C C"]:
    """`sum_k rows[t, k] keys[j, k] exp(sum of log_alpha[s, k] over j < s <= t)`; 0 for `t < j`."""
    size = log_alpha.shape[-2]
    if size <= _DIRECT:
        index = jnp.arange(size)
        seen = index[:, None] >= index[None, :]
        steps = jnp.swapaxes(log_alpha, -1, -2)  # [*h, K, C]
        decays = jnp.exp(segment_sums(steps, seen)) * seen  # [*h, K, C, C]
        return jnp.einsum("...tk,...jk,...ktj->...tj", rows, keys, decays, precision="highest")
    if size % 2:  # a step of zeros makes the halves equal
        rows, keys, log_alpha = (
            jnp.pad(x, (*((0, 0),) * (x.ndim - 2), (0, 1), (0, 0))) for x in (rows, keys, log_alpha)
        )
        return _decayed_products(rows, keys, log_alpha, precision)[..., :-1, :-1]
    half = size // 2

    def halves(x: Array) -> Array:  # [..., C, K] -> [..., 2, C / 2, K]
        return x.reshape(*x.shape[:-2], 2, half, x.shape[-1])

    rows, keys, log_alpha = halves(rows), halves(keys), halves(log_alpha)
    inside = _decayed_products(rows, keys, log_alpha, precision)
    late = rows[..., 1, :, :] * jnp.exp(jnp.cumsum(log_alpha[..., 1, :, :], axis=-2))
    early = keys[..., 0, :, :] * jnp.exp(_sums_after(log_alpha[..., 0, :, :]))
    across = jnp.matmul(late, jnp.swapaxes(early, -1, -2), precision=precision)
    first, second = inside[..., 0, :, :], inside[..., 1, :, :]
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([across, second], axis=-1)], axis=-2)
