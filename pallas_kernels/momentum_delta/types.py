"""Arrays of one call as the kernels see them, and the static sizes and options of a call.

A kernel's operands and results are named tuples of arrays; its body gets the same tuples with
references in place of arrays, and None for an array that is not there (the erase key, a scale).
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.momentum_delta.numerics import Numerics
from pallas_kernels.tiling import Tiles

Leaf = Any
"""An array; in specifications and kernel bodies, what stands for it there."""

CHUNK = 64
"""Steps in a chunk. The matrices inside a chunk are `[CHUNK, CHUNK]`."""
HALF = CHUNK // 2
"""Steps that gates are turned into coefficients for at once."""
HALVES = (pl.ds(0, HALF), pl.ds(HALF, HALF))
"""The two halves of a chunk, as indices."""

CHUNK_FACTORS = "mdn_chunk_factors"
"""Name of the residuals without states, for policies of `jax.checkpoint`.

`jax.checkpoint_policies.save_only_these_names(CHUNK_FACTORS)` keeps these and has the states, most
of the residuals, computed again by one kernel. `CHUNK_STATES` names the states.
"""
CHUNK_STATES = "mdn_chunk_states"


class Exchange(Protocol):
    """How the stretches of a row, each on a device of its own, learn of each other.

    Over a stretch states `X` `[B, HV, R, V]` become `Phi X + U`, with `Phi` `[B, HV, R, R]`. What
    documents let through from stretch to stretch, `seams`, only this knows.
    """

    def entering(self, phi: Leaf, u: Leaf, given: Leaf, seams: Leaf) -> Leaf:
        """The states before this stretch, from those `given` before the row."""

    def leaving(self, phi: Leaf, own: Leaf, seams: Leaf) -> Leaf:
        """The gradient of the states behind this stretch by what the stretches behind it return.

        From `own`, the gradient of the states before each stretch by what it returns itself.
        """


class Options(NamedTuple):
    """What is fixed when the rule is traced.

    Attributes:
      scale: factor on the output.
      normalize: l2-normalise q and k.
      tiles: block shapes, warps, stages.
      numerics: dtypes and precisions; whether the kernels run in the interpreter.
      exchange: of rows that are stretches of longer ones; None: they are whole.
    """

    scale: float
    normalize: bool
    tiles: Tiles
    numerics: Numerics
    exchange: Exchange | None = None

    @property
    def interpret(self) -> bool:
        """Run the kernels in the interpreter, on any device."""
        return self.numerics.interpret


class Tokens(NamedTuple):
    """Arrays with a time axis; `T` is a multiple of `CHUNK`.

    Attributes:
      q: `[B, T, H, K]`, bfloat16, float16 or float32 as all but the gates.
      k: `[B, T, H, K]`.
      v: `[B, T, HV, V]`.
      p: `[B, T, H or HV, K]`, or None for `alpha` times the normalised key.
      log_alpha: `[B, T, HV]` float32, as the other gates.
      log_mu: `[B, T, HV]`.
      beta: `[B, T, HV]`.
      eta: `[B, T, HV]`.
    """

    q: Leaf
    k: Leaf
    v: Leaf
    p: Leaf | None
    log_alpha: Leaf
    log_mu: Leaf
    beta: Leaf
    eta: Leaf

    @property
    def sizes(self) -> "Sizes":
        """The static sizes of the call."""
        batch, length, heads, key_dim = self.q.shape
        p_heads = heads if self.p is None else self.p.shape[2]
        return Sizes(batch, length, heads, p_heads, self.v.shape[2], key_dim, self.v.shape[3])


class Memory(NamedTuple):
    """Memory and momentum as callers have them.

    Attributes:
      s: `[B, HV, K, V]`, float32; in the decode kernels also bfloat16, or float16 with `scale`.
      m: the same.
      scale: of float16: of the columns of `s` and of `m`, `[B, HV, 2, V]` float32; None: 1.
    """

    s: Leaf
    m: Leaf
    scale: Leaf | None = None


class States(NamedTuple):
    """Memory and negated momentum of each chunk, or their gradients.

    Attributes:
      s: `[B, HV, NT, K, V]`, in the storage dtype.
      n: the same.
      scale: block scale of float16, `[B, HV, NT, blocks of V]` float32; None: 1.
    """

    s: Leaf
    n: Leaf
    scale: Leaf | None


class Values(NamedTuple):
    """What has the shape of the values.

    Attributes:
      data: `[B, T, HV, V]`.
      scale: block scale of float16, `[B, HV, NT, blocks of V]` float32; None: 1.
    """

    data: Leaf
    scale: Leaf | None


class WalkKeys(NamedTuple):
    """Keys as the state passes multiply states by them.

    In float16 where the states are: rows times the powers of two that make them about 1 long, which
    loses nothing of bfloat16's 8 digits.

    Attributes:
      k: `[B, T, H, K]`.
      p: `[B, T, H or HV, K]`, or None.
    """

    k: Leaf
    p: Leaf | None


class IntraChunk(NamedTuple):
    """What the gates, keys and queries of a chunk give, whatever the states.

    Attributes:
      attention: `tril(Q K^T * gamma * eta) * scale`, `[B, HV, NT, C, C]`, in the operands' dtype.
      inverse: `(I + L)^-1` minus the identity: what a step's v_new takes from earlier residuals of
        the chunk. Same shape, in the storage dtype (float16: scale `ChunkScalar.INVERSE_SCALE`).
      factors: row factors `[B, HV, NT, 13, C]` float32 (rows.py).
      keys: in float16; None where the state passes take them as they are.
    """

    attention: Leaf
    inverse: Leaf
    factors: Leaf
    keys: WalkKeys | None

    def walk_keys(self, x: Tokens) -> WalkKeys:
        """Those that the state passes take."""
        return self.keys or WalkKeys(x.k, x.p)


class KeyGradients(NamedTuple):
    """Gradients of queries, keys and (if given) erase keys per value head, `[B, T, HV, K]`."""

    q: Leaf
    k: Leaf
    p: Leaf | None


class Sizes(NamedTuple):
    """Static sizes of a call."""

    batch: int
    length: int
    heads: int
    p_heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    @property
    def chunks(self) -> int:
        """Chunks in a row, `NT`."""
        return self.length // CHUNK

    def per_chunk(self, *shape: int, dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        """`[B, HV, NT, *shape]`."""
        return jax.ShapeDtypeStruct((self.batch, self.value_heads, self.chunks, *shape), dtype)

    def per_head(self, width: int, dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        """`[B, T, HV, width]`."""
        return jax.ShapeDtypeStruct((self.batch, self.length, self.value_heads, width), dtype)

    @property
    def gate(self) -> jax.ShapeDtypeStruct:
        """`[B, T, HV]` float32."""
        return jax.ShapeDtypeStruct((self.batch, self.length, self.value_heads), jnp.float32)

    @property
    def memory(self) -> Memory:
        """Both `[B, HV, K, V]` float32."""
        shape = (self.batch, self.value_heads, self.key_dim, self.value_dim)
        state = jax.ShapeDtypeStruct(shape, jnp.float32)
        return Memory(state, state)

    def scales(self, block: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct | None:
        """One for each chunk and `block` columns of V, for data of `dtype`."""
        if dtype != jnp.float16:
            return None
        return self.per_chunk(self.value_dim // block, dtype=jnp.float32)

    def states(self, block: int, dtype: jnp.dtype) -> States:
        """A pair of states for each chunk, in block scales for `block` columns of V."""
        state = self.per_chunk(self.key_dim, self.value_dim, dtype=dtype)
        return States(state, state, self.scales(block, dtype))
