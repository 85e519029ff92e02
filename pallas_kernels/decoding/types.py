"""Arrays of one token's step as the kernels see them, and its static sizes and options."""

from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp

from pallas_kernels.decoding.tiles import Tiles
from pallas_kernels.tiling import DecodeTiles

Leaf = Any
"""An array; in specifications and kernel bodies, what stands for it there."""

GATES = ("a", "b", "e", "m")
"""Projections of the gates, in the order of their columns; "m" is not there without momentum."""


class Gates(NamedTuple):
    """What a head's gates need beside the projections, `[HV]` float32 each.

    Attributes:
      rate: factor of the decay, `exp(a_log)`.
      rate_bias: added to the decay's projection.
      momentum_rate: factor of the momentum's decay, `exp(mu_log)`; None: a momentum of zero.
      momentum_bias: added to the momentum's projection; None with `momentum_rate`.
      factor: of eta in `tan(theta)`, `exp(log_factor)`; None with `step_bias`.
      step_bias: added to the step size's projection; None with `factor`.
      correction: factor of the key that is taken off the query; None: no output correction.
    """

    rate: Leaf
    rate_bias: Leaf
    momentum_rate: Leaf | None
    momentum_bias: Leaf | None
    factor: Leaf | None
    step_bias: Leaf | None
    correction: Leaf | None


class LayerWeights(NamedTuple):
    """Of a layer; matrices have a row for each output, in the compute dtype.

    Attributes:
      projections: times the scale of the norm before them: q, k, v, output gate (if there is
        one) and gates, one below the other, `[2 H K + HV V (+ HV V) + gates HV, hidden]`.
      taps: of the convolutions of q, k and v side by side, `[W, 2 H K + HV V]` float32.
      bias: `[2 H K + HV V]` float32, or None.
      gates: of the heads.
      output_norm: `[V]`.
      output: `[hidden, HV V]`.
      up: times the scale of the norm before them: gate and up projections one below the other,
        `[2 F, hidden]`; None, as the next one, without an MLP.
      down: `[hidden, F]`.
    """

    projections: Leaf
    taps: Leaf
    bias: Leaf | None
    gates: Gates
    output_norm: Leaf
    output: Leaf
    up: Leaf | None
    down: Leaf | None


class LayerMemory(NamedTuple):
    """What a layer keeps of the tokens before.

    Attributes:
      s: memory `[B, HV, K, V]` float32, or bfloat16: computed with in float32 all the same.
      m: momentum, the same.
      tail: the last `W` inputs of the convolutions of q, k and v side by side,
        `[B, W, 2 H K + HV V]`, in the compute dtype: a ring, so that a token overwrites the one
        input that no tap sees any more.
    """

    s: Leaf
    m: Leaf
    tail: Leaf


class Stream(NamedTuple):
    """The residual stream.

    Attributes:
      h: `[B, hidden]` in the compute dtype.
      squares: sums of the squares of some columns of `h` each, `[B, blocks]` float32.
    """

    h: Leaf
    squares: Leaf


class Plan(NamedTuple):
    """What is fixed when a step is traced.

    Attributes:
      heads: of queries and keys.
      value_heads: of values, a multiple of `heads`.
      key_dim: K.
      value_dim: V.
      conv_size: taps of the convolutions, `W`.
      gated: whether the output has a gate.
      eps: of every norm.
      tau: what the write scale's projection is divided by.
      min_log_mu: least log of the momentum; None: none.
      bound: of the decay and the step size, as of `MDNConfig`.
      margin: of the stable bound.
      least_decay: nats that its momentum loses at least.
      erase_by_alpha: whether the erase key is alpha times the key, or the key.
      interpret: run the kernels in the interpreter, on any device.
      tiles: in place of those that ship; by the kernel's name.
    """

    heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_size: int
    gated: bool
    eps: float
    tau: float
    min_log_mu: float | None
    bound: Literal["published", "stable", "alpha", "beta", "none"]
    margin: float
    least_decay: float
    erase_by_alpha: bool
    interpret: bool = False
    tiles: tuple[tuple[str, Tiles | DecodeTiles], ...] = ()

    @property
    def keys(self) -> int:
        """Width of queries and of keys, `H K`."""
        return self.heads * self.key_dim

    @property
    def values(self) -> int:
        """Width of values, `HV V`."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Of the convolutions."""
        return 2 * self.keys + self.values

    @property
    def rounded(self) -> int:
        """Outputs of the joined projections that are rounded to the compute dtype."""
        return self.channels + self.values * self.gated

    def tiles_of[T](self, name: str, shipped: T) -> T:
        """The tiles of a kernel."""
        return cast(T, dict(self.tiles).get(name, shipped))


def like(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a result."""
    return jax.ShapeDtypeStruct(shape, dtype)
