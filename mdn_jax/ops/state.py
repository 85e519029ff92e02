"""The recurrent state of the momentum delta rule, the same in 16 bits, and with steps since."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

StateDtype = Literal["float32", "bfloat16", "float16_scaled"]
"""How states are kept between calls; arithmetic is in float32."""
STATE_DTYPES: tuple[StateDtype, ...] = get_args(StateDtype)

_DOUBLINGS = 13
_SMALLEST = 2.0**-100


class MDNState(NamedTuple):
    """Memory and momentum of every value head; a pytree.

    Attributes:
      s: the memory ``S``, `[B, HV, K, V]`, float32 (float64 for float64 inputs).
      m: the momentum ``M`` with the sign of ``M = mu M + eta k w^T``, same shape and dtype.
    """

    s: Float[Array, "B HV K V"]
    m: Float[Array, "B HV K V"]

    @classmethod
    def zeros(
        cls,
        batch: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> "MDNState":
        """The state before the first token: zeros, in two buffers, so that it can be donated."""
        shape = (batch, heads, key_dim, value_dim)
        return cls(s=jnp.zeros(shape, dtype), m=jnp.zeros(shape, dtype))


class CompactState(NamedTuple):
    """Memory and momentum in 16 bits; a pytree. Calls read and write it, and compute in float32.

    Attributes:
      s: the memory, `[B, HV, K, V]`, bfloat16 or float16.
      m: the momentum, same shape and dtype.
      scale: of float16: what the columns of `s` and of `m` are multiples of, powers of two,
        `[B, HV, 2, V]` float32, so that the largest number of a column is at most 2^14; None for
        bfloat16.
    """

    s: Float[Array, "B HV K V"]
    m: Float[Array, "B HV K V"]
    scale: Float[Array, "B HV 2 V"] | None

    @property
    def state_dtype(self) -> StateDtype:
        """Its name among `STATE_DTYPES`."""
        return "bfloat16" if self.scale is None else "float16_scaled"


Kept = MDNState | CompactState
"""A state as it is kept between calls."""


class ReplayState(NamedTuple):
    """States of some steps ago and the steps since, in rings of `2L` slots; a pytree.

    Attributes:
      base: states that the steps since go on from, of any kind of keeping.
      keys: as they came, not normalised, `[B, H, 2L, K]` in k's dtype.
      v_new: what each step wrote, its value less what the memory held, `[B, HV, 2L, V]`, float32
        (float64 for float64).
      gates: alpha, mu, beta, and eta times the inverse norm of the key, `[B, HV, 2L, 4]`, the same.
      counts: the slot of the oldest step and how many there are, at most `2L - 1`, `[B, HV, 2]`
        int32. At least the last L are there, once there were so many.
    """

    base: Kept
    keys: Float[Array, "B H 2L K"]
    v_new: Float[Array, "B HV 2L V"]
    gates: Float[Array, "B HV 2L 4"]
    counts: Int[Array, "B HV 2"]

    @property
    def length(self) -> int:
        """Steps between two writes of the states, `L`."""
        return self.keys.shape[2] // 2

    @property
    def kept(self) -> Int[Array, " B"]:
        """Steps of each row that `rewind` can take back."""
        return self.counts[:, 0, 1]


def keep(state: MDNState, state_dtype: StateDtype) -> Kept:
    """Rounds a state to how it is kept.

    Args:
      state: float32.
      state_dtype: "float32": as it is.

    Raises:
      ValueError: an unknown `state_dtype`, or 16 bits of a float64 state.
    """
    check_state_dtype(state_dtype)
    if state_dtype == "float32":
        return state
    if state.s.dtype != jnp.float32:
        raise ValueError(
            f'state_dtype: expected "float32" (as it is) for {state.s.dtype.name} states, '
            f"got {state_dtype!r}"
        )
    if state_dtype == "bfloat16":
        s, m = (x.astype(jnp.bfloat16) for x in state)
        return CompactState(s, m, None)
    scales = [_scale(x) for x in state]  # [B, HV, 1, V]
    s, m = ((x / scale).astype(jnp.float16) for x, scale in zip(state, scales, strict=True))
    return CompactState(s, m, jnp.concatenate(scales, axis=2))


def full(state: Kept) -> MDNState:
    """A kept state in float32; one that is no `CompactState` as it is."""
    if not isinstance(state, CompactState):
        return state
    s, m = state.s.astype(jnp.float32), state.m.astype(jnp.float32)
    if state.scale is None:
        return MDNState(s, m)
    return MDNState(s * state.scale[:, :, :1], m * state.scale[:, :, 1:])


def computed_in_full[A, O](
    rule: Callable[[A, Any, Any], tuple[O, MDNState]],
    arrays: A,
    state: Kept | None,
    segment_ids: Array | None,
) -> tuple[O, Any]:
    """A rule of float32 states on a kept one, which comes back as it was kept."""
    if not isinstance(state, CompactState):
        return rule(arrays, state, segment_ids)
    o, after = rule(arrays, full(state), segment_ids)
    return o, keep(after, state.state_dtype)


def kept_as(state: Kept) -> StateDtype:
    """The `state_dtype` of a kept state; float64 states are "float32", as they are."""
    return state.state_dtype if isinstance(state, CompactState) else "float32"


def check_state_dtype(state_dtype: Any) -> None:
    """Raises ValueError unless it is one of `STATE_DTYPES`."""
    if state_dtype not in STATE_DTYPES:
        raise ValueError(
            f"state_dtype: expected one of {', '.join(STATE_DTYPES)}, got {state_dtype!r}"
        )


def _scale(x: Float[Array, "B HV K V"]) -> Float[Array, "B HV 1 V"]:
    """The power of two for each column with which its largest number is in [2^13, 2^14)."""
    largest = jnp.max(jnp.abs(x), axis=2, keepdims=True)
    usable = jnp.isfinite(largest)
    _, exponent = jnp.frexp(jnp.where(usable, jnp.maximum(largest, _SMALLEST), 1.0))
    return jnp.ldexp(jnp.float32(1.0), exponent - 1 - _DOUBLINGS)
