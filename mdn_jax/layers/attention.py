"""Softmax attention: rotary positions or none, grouped heads, a window, for hybrid models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mdn_jax.layers.arguments import check_activations, check_cache, counted, without_padding
from mdn_jax.layers.attend import Tokens, attend
from mdn_jax.layers.context import (
    check_stretch,
    inside_shard_map,
    own_stretch,
    whole_rows,
)
from mdn_jax.layers.explicit import tokens_and_cache, under_explicit_meshes
from mdn_jax.layers.rotary import rotate
from mdn_jax.ops.context import context_size, of_last_device
from mdn_jax.ops.inputs import document_numbers, document_starts


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("k", "v", "positions", "next_position"),
    meta_fields=("capacity",),
)
@dataclasses.dataclass(frozen=True)
class AttentionCache:
    """Keys and values of the tokens before, oldest first; a pytree.

    Attributes:
      k: rotated keys, `[B, L, KVH, D]`.
      v: values, `[B, L, KVH, D]`.
      positions: position of each entry in its document; -1: empty, never seen.
      next_position: position of the next token.
      capacity: the entries that a call keeps, the newest ones; None: all, so that `L` grows.
    """

    k: Float[Array, "B L KVH D"]
    v: Float[Array, "B L KVH D"]
    positions: Int[Array, "B L"]
    next_position: Int[Array, " B"]
    capacity: int | None

    def resized(self, capacity: int) -> "AttentionCache":
        """The newest `capacity` entries, behind empty ones where there are fewer."""
        drop = max(0, self.k.shape[1] - capacity)
        add = max(0, capacity - self.k.shape[1])

        def resize(x: Array, empty: int) -> Array:
            pad = ((0, 0), (add, 0)) + ((0, 0),) * (x.ndim - 2)
            return jnp.pad(x[:, drop:], pad, constant_values=empty)

        return AttentionCache(
            k=resize(self.k, 0),
            v=resize(self.v, 0),
            positions=resize(self.positions, -1),
            next_position=self.next_position,
            capacity=capacity,
        )

    def rewound(self, steps: Int[Array, " B"]) -> "AttentionCache":
        """Without the newest `steps` entries of each row, behind as many empty ones."""
        empty = jnp.arange(self.k.shape[1]) < steps[:, None]

        def older(x: Array, nothing: int) -> Array:
            gone = empty.reshape(*empty.shape, *(1,) * (x.ndim - 2))
            return jnp.where(gone, jnp.asarray(nothing, x.dtype), _padding_first(x, -steps))

        return AttentionCache(
            k=older(self.k, 0),
            v=older(self.v, 0),
            positions=older(self.positions, -1),
            next_position=self.next_position - steps,
            capacity=self.capacity,
        )


class SoftmaxAttention(nnx.Module):
    """Causal softmax attention within documents.

    Args:
      hidden_size: width of input and output; the head width is `hidden_size / num_heads`.
      num_heads: query heads.
      num_kv_heads: key and value heads, each shared by consecutive query heads; None: `num_heads`.
      qkv_bias: biases in the query, key and value projections.
      window_size: a token sees itself and the `window_size - 1` tokens before it; None: all.
      rope_theta: base of the rotary embedding; None: no positions.
      initializer_range: standard deviation of the weights.
      context_axis: mesh axis over which the tokens of a row are cut, see `__call__`.
      dtype: of the computation; the softmax is float32 (float64 for float64).
      param_dtype: of the parameters.
      rngs: random keys for the initialisation, stream `params`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        window_size: int | None = None,
        rope_theta: float | None = 10000.0,
        initializer_range: float = 0.02,
        context_axis: str | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if hidden_size % (2 * num_heads):
            raise ValueError(
                f"num_heads: expected heads of an even width (hidden_size = {hidden_size}), "
                f"got {num_heads}"
            )
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}"
            )
        self.head_dim = hidden_size // num_heads
        self.window_size = window_size
        self.rope_theta = rope_theta
        self.context_axis = context_axis
        self.dtype = dtype

        def linear(outputs: int, use_bias: bool) -> nnx.Linear:
            return nnx.Linear(
                hidden_size,
                outputs,
                use_bias=use_bias,
                kernel_init=jax.nn.initializers.normal(initializer_range),
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.q_proj = linear(hidden_size, qkv_bias)
        self.k_proj = linear(self.num_kv_heads * self.head_dim, qkv_bias)
        self.v_proj = linear(self.num_kv_heads * self.head_dim, qkv_bias)
        self.o_proj = linear(hidden_size, False)

    def init_cache(self, batch_size: int, max_length: int | None = None) -> AttentionCache:
        """The cache before the first token.

        Args:
          batch_size: rows.
          max_length: room for this many tokens from the start, so that no call changes a shape;
            older tokens are forgotten. None: the cache grows (with a window, up to the window).

        Raises:
          ValueError: `max_length` below 1.
        """
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length: expected an int >= 1 or None, got {max_length!r}")
        before = None if self.window_size is None else self.window_size - 1
        limits = [n for n in (max_length, before) if n is not None]
        capacity = min(limits) if limits else None
        length = 0 if max_length is None else min(limits)
        empty = jnp.zeros((batch_size, length, self.num_kv_heads, self.head_dim), self.dtype)
        return AttentionCache(
            k=empty,
            v=empty,
            positions=jnp.full((batch_size, length), -1, jnp.int32),
            next_position=jnp.zeros((batch_size,), jnp.int32),
            capacity=capacity,
        )

    @under_explicit_meshes(tokens_and_cache)
    def __call__(
        self,
        x: Float[Array, "B T hidden"],
        segment_ids: Int[Array, "B T"] | None = None,
        cache: AttentionCache | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T hidden"], AttentionCache]:
        """Mixes the tokens of each document.

        Inside a `jax.shard_map` that cuts tokens over `context_axis`, `x` and `segment_ids` are
        this device's stretch of the rows, which gathers the keys and values of all of them;
        `cache` and the cache returned are those before and after the whole rows.

        Args:
          x: inputs, any float dtype.
          segment_ids: document of each token, any integers: where they change a document starts,
            positions restart and nothing before is seen.
          cache: continues the row's first document, whatever its id; None means it starts here.
          lengths: tokens of each row that count, 0 included; the padding after them, any values,
            has meaningless outputs and leaves no trace. None: all. Not with `segment_ids`.

        Returns:
          The outputs in the compute dtype, and the cache of the row's last document.

        Raises:
          TypeError: a dtype or type that does not fit.
          ValueError: a shape that does not fit.
        """
        check_activations(x, self.hidden_size, segment_ids, lengths)
        check_stretch(lengths, self.context_axis)
        axis = self.context_axis if inside_shard_map(self.context_axis) else None
        batch, length, _ = x.shape
        if cache is None:
            cache = self.init_cache(batch)
        rows = (batch, None, self.num_kv_heads, self.head_dim)
        shapes = {"k": rows, "v": rows, "positions": rows[:2], "next_position": (batch,)}
        check_cache(cache, AttentionCache, shapes)
        x = without_padding(x.astype(self.dtype), lengths)
        row = queries = _tokens(segment_ids, cache.next_position, (batch, length))
        if axis is not None:
            ids = None if segment_ids is None else whole_rows(segment_ids, axis)
            row = _tokens(ids, cache.next_position, (batch, length * context_size(axis)))
            queries = own_stretch(row, axis, length)
        q = self.q_proj(x).reshape(batch, length, self.num_heads, self.head_dim)
        k = self.k_proj(x).reshape(batch, length, self.num_kv_heads, self.head_dim)
        v = self.v_proj(x).reshape(batch, length, self.num_kv_heads, self.head_dim)
        if self.rope_theta is not None:
            q = rotate(q, queries.positions, theta=self.rope_theta)
            k = rotate(k, queries.positions, theta=self.rope_theta)

        if axis is not None:
            k, v = whole_rows((k, v), axis)
        k = jnp.concatenate([cache.k.astype(k.dtype), k], axis=1)  # [B, L + T, KVH, D]
        v = jnp.concatenate([cache.v.astype(v.dtype), v], axis=1)
        before = Tokens(positions=cache.positions, documents=jnp.zeros_like(cache.positions))
        keys = Tokens(*(jnp.concatenate(x, axis=1) for x in zip(before, row, strict=True)))
        o = attend(
            *(q, k, v, queries, keys, self.window_size),
            packed=segment_ids is not None,
            last=axis is None,
        )
        y = self.o_proj(o.reshape(x.shape))

        kept = keys.documents == row.documents[:, -1:]
        next_position = row.positions[:, -1] + 1
        if lengths is not None:
            kept = jnp.pad(
                counted(lengths, length), ((0, 0), (cache.k.shape[1], 0)), constant_values=True
            )
            next_position = cache.next_position + lengths
        positions = jnp.where(kept, keys.positions, -1)
        if segment_ids is not None or lengths is not None:
            k, v = (jnp.where(kept[:, :, None, None], z, 0.0) for z in (k, v))
        if lengths is not None:
            k, v, positions = (_padding_first(z, lengths - length) for z in (k, v, positions))
        entries = k.shape[1] if cache.capacity is None else min(k.shape[1], cache.capacity)
        last = slice(k.shape[1] - entries, None)
        entries_kept = (k[:, last], v[:, last], positions[:, last], next_position)
        if axis is not None:
            entries_kept = of_last_device(entries_kept, axis)
        return y, AttentionCache(*entries_kept, capacity=cache.capacity)


def _padding_first(x: Array, shift: Int[Array, " B"]) -> Array:
    """Rolls each row along its entries, so that the last `-shift` of them come first."""
    order = (jnp.arange(x.shape[1]) + shift[:, None]) % x.shape[1]
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)


def _tokens(
    segment_ids: Int[Array, "B T"] | None, first: Int[Array, " B"], shape: tuple[int, int]
) -> Tokens:
    """Counts documents from 0, and positions from 0 in each; from `first` in document 0."""
    starts = document_starts(segment_ids, shape)
    documents = document_numbers(segment_ids, shape)
    steps = jnp.arange(shape[1], dtype=jnp.int32)
    start = jax.lax.cummax(jnp.where(starts, steps, 0), axis=1)
    positions = steps - start + jnp.where(documents == 0, first[:, None], 0)
    return Tokens(positions=positions, documents=documents)
