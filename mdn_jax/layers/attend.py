"""Softmax attention over the keys that each query may see."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Tokens(NamedTuple):
    """Where tokens are: in which document of the row, and at which position of it (-1: nowhere)."""

    positions: Int[Array, "B N"]
    documents: Int[Array, "B N"]


def fused_implementation(
    q: Float[Array, "B T H D"], k: Float[Array, "B S KVH D"], *, packed: bool
) -> Literal["cudnn", "xla"] | None:
    """That of `jax.nn.dot_product_attention` which can run the call; None: none.

    Queries and keys must be the same tokens (no cache before them), in a dtype, a head width and a
    number that cuDNN takes.
    """
    if jax.default_backend() != "gpu":
        return None
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    length, width = q.shape[1], q.shape[3]
    fits = (
        capability in ("8.0", "9.0", "10.0")
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and length == k.shape[1]
        and length >= 64
        and not (packed and length % 2)  # its mask is a bias, whose gradient needs an even number
        and width % 8 == 0
        and width <= 128
    )
    return "cudnn" if fits else None


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S KVH D"],
    v: Float[Array, "B S KVH D"],
    queries: Tokens,
    keys: Tokens,
    window: int | None,
    *,
    packed: bool,
    last: bool = True,
    block: int = 512,
) -> Float[Array, "B T H D"]:
    """Softmax attention of each query to itself and to the keys before it that it may see.

    cuDNN's fused kernels, where they can run the call. Otherwise the queries go in blocks, each
    with the keys within its reach and recomputed in the backward pass, so that memory is linear in
    `S`, not in `T S`.

    Args:
      q: rotated queries.
      k: rotated keys; those of the queries among them.
      v: values.
      queries: where the queries are.
      keys: where the keys are.
      window: a token sees itself and the `window - 1` tokens before it; None: all.
      packed: whether `queries` can be of several documents.
      last: whether the last `T` keys are those of the queries; otherwise they are anywhere.
      block: queries in a block.
    """
    fused = fused_implementation(q, k, packed=packed) if last else None
    if fused is not None:
        same = queries.documents[:, None, :, None] == keys.documents[:, None, None, :]
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=same if packed else None,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=fused,
        )
    offset = k.shape[1] - q.shape[1]

    @jax.checkpoint
    def attend_block(q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens) -> Array:
        distance = queries.positions[:, :, None] - keys.positions[:, None, :]  # [B, T, S]
        visible = (distance >= 0) & (keys.positions >= 0)[:, None, :]
        visible &= queries.documents[:, :, None] == keys.documents[:, None, :]
        if window is not None:
            visible &= distance < window
        wide = jnp.promote_types(q.dtype, jnp.float32)
        grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        logits = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=wide)
        logits = jnp.where(visible[:, None, None], logits * q.shape[3] ** -0.5, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(q.shape)

    outputs = []
    for start in range(0, q.shape[1], block):
        stop = min(start + block, q.shape[1])
        first = 0 if window is None else max(0, offset + start + 1 - window)
        ours, theirs = slice(start, stop), slice(first, offset + stop) if last else slice(None)
        tokens = (Tokens(*(x[:, ours] for x in queries)), Tokens(*(x[:, theirs] for x in keys)))
        outputs.append(attend_block(q[:, ours], k[:, theirs], v[:, theirs], *tokens))
    return jnp.concatenate(outputs, axis=1)
