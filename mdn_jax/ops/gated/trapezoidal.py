"""The state space of Mamba-3: an exponential-trapezoidal step and a rotating memory.

    S_t = alpha_t R_t (S_(t-1) + (1 - lam_t) dt_t k_(t-1) v_(t-1)^T) + lam_t dt_t k_t v_t^T

The scan is this. The chunk algorithm is that of `gated_linear_attention`, by two identities:

* What step `t + 1` adds of step `t` decays as what step `t` wrote itself. So step `t` writes
  `lam_t dt_t + (1 - lam_(t+1)) dt_(t+1)` at once, and only its own query sees `lam_t dt_t`.
* Rotations commute with the decays: keys and queries are turned back by the sum of the angles up to
  their step, and the final state forward by all of them.
"""

import math
from functools import partial
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mdn_jax.ops.arguments import VALUE_DTYPES, check_options, describe
from mdn_jax.ops.gated.inputs import GatedInputs
from mdn_jax.ops.gated.portable import (
    PortableImplementation,
    check_common,
    check_gate,
    run_portable,
)
from mdn_jax.ops.inputs import (
    compute_dtype,
    document_starts,
    entering_state,
    grouped,
    pad_time,
    split_time,
    wide_dtypes,
)
from mdn_jax.ops.on_mesh import under_explicit_meshes


class TrapezoidalState(NamedTuple):
    """What the rule keeps of the steps before; a pytree.

    Attributes:
      s: the memory ``S``, `[B, HV, K, V]`, float32 (float64 for float64 inputs).
      k: key of the last step, `[B, H, K]`, the same dtype.
      v: value of the last step, `[B, HV, V]`, the same dtype.
    """

    s: Float[Array, "B HV K V"]
    k: Float[Array, "B H K"]
    v: Float[Array, "B HV V"]


class _Inputs(NamedTuple):
    """Arrays of a call, in the dtype to compute in, with value heads grouped by key head."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H G V"]
    log_alpha: Float[Array, "B T H G"]
    before: Float[Array, "B T H G"]  # (1 - lam) dt, of the step before; 0 where a document starts
    now: Float[Array, "B T H G"]  # lam dt, of the step itself
    angles: Float[Array, "B T H R"]
    starts: Bool[Array, "B T"]


@partial(under_explicit_meshes, shared_heads=False)
def trapezoidal_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    log_alpha: Float[Array, "B T HV"],
    dt: Float[Array, "B T HV"],
    lam: Float[Array, "B T HV"],
    angles: Float[Array, "B T H R"],
    *,
    scale: float | None = None,
    initial_state: TrapezoidalState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: PortableImplementation | None = None,
) -> tuple[Float[Array, "B T HV V"], TrapezoidalState]:
    """Linear attention with the step of Mamba-3 (arXiv 2603.15569, one input and one output).

        S_t = alpha_t R_t S_(t-1) + beta_t R_t k_(t-1) v_(t-1)^T + gamma_t k_t v_t^T
        beta_t = (1 - lam_t) dt_t alpha_t,   gamma_t = lam_t dt_t,   o_t = scale S_t^T q_t

    `R_t` turns channels `2i` and `2i + 1` by `angles[i]`, for `i < R`, and leaves the others. In
    the terms of Mamba-3 `q` is `C`, `k` is `B`, `v` is `x`, `log_alpha` is `dt A` and `scale` 1.
    (The published code turns the other way.) Without rotation and with `lam = 1` it is
    `gated_linear_attention`. Differentiable in every array and through the state.

    Args:
      q: queries, float32, bfloat16, float16 or float64; used as they are.
      k: keys, same shape and dtype as `q`; used as they are.
      v: values, same dtype. `HV` is a multiple of `H`: value head `h` uses key head `h // (HV/H)`.
      log_alpha: log of the decay, at most 0 (nats); float32, or float64 for float64 inputs.
      dt: step size, at least 0; any float dtype.
      lam: share of the step's own write, in [0, 1], the rest being of the step before; any float
        dtype.
      angles: of the rotation (radians), any float dtype; `R` is at least 1 and at most `K / 2`.
      scale: factor on the output, any finite number; None means `K ** -0.5`.
      initial_state: state before the first step, of the row's first document; None means zeros.
      segment_ids: document of each step, any integers: where they change a document starts, and
        the state is reset, the step before included.
      chunk_size: steps in a chunk; None: chosen for the implementation.
      implementation: "scan" (the definition), "xla" (chunkwise), or None: "xla".

    Returns:
      The outputs in `v`'s dtype; the final state, float32 (float64 for float64 inputs), of the last
      document.

    Raises:
      ValueError: a shape, a value or an implementation that does not fit.
      TypeError: a dtype or type that does not fit.
    """
    check_options(scale, chunk_size, implementation, get_args(PortableImplementation))
    shapes = _check(q, k, v, log_alpha, dt, lam, angles, initial_state, segment_ids)
    heads, key_dim = q.shape[2:]
    compute = compute_dtype(q)
    given = initial_state or TrapezoidalState(None, None, None)  # type: ignore[arg-type]
    state = TrapezoidalState(
        *(entering_state(x, shape, compute, v) for x, shape in zip(given, shapes, strict=True))
    )
    starts = document_starts(segment_ids, (q.shape[0], q.shape[1]))
    dt, lam = grouped(dt, heads, compute), grouped(lam, heads, compute)
    inputs = _Inputs(
        q=q.astype(compute),
        k=k.astype(compute),
        v=grouped(v, heads, compute),
        log_alpha=grouped(log_alpha, heads, compute),
        before=jnp.where(starts[:, :, None, None], 0, (1 - lam) * dt),
        now=lam * dt,
        angles=angles.astype(compute),
        starts=starts,
    )
    scale = key_dim**-0.5 if scale is None else scale
    if implementation == "scan":
        o, s = _scan(inputs, state, scale=scale, chunk_size=chunk_size)
        o = o.reshape(v.shape).astype(v.dtype)
    else:
        o, s = _chunkwise(inputs, state, v, scale=scale, chunk_size=chunk_size)
    last = TrapezoidalState(s, inputs.k[:, -1], inputs.v[:, -1].reshape(state.v.shape))
    return o, last


def _check(
    q: Array,
    k: Array,
    v: Array,
    log_alpha: Array,
    dt: Array,
    lam: Array,
    angles: Array,
    initial_state: TrapezoidalState | None,
    segment_ids: Array | None,
) -> tuple[tuple[int, ...], ...]:
    """Raises ValueError or TypeError for the first array that does not fit; shapes of the state."""
    check_common(q, k, v, segment_ids)
    (batch, length, heads, key_dim), (value_heads, value_dim) = q.shape, v.shape[2:]
    wide, per_head = wide_dtypes(q), (batch, length, value_heads)
    narrow = (*VALUE_DTYPES[:2], *wide)
    check_gate("log_alpha", log_alpha, per_head, "[B, T, HV]", wide, q)
    check_gate("dt", dt, per_head, "[B, T, HV]", narrow, q)
    check_gate("lam", lam, per_head, "[B, T, HV]", narrow, q)
    count = angles.shape[-1] if getattr(angles, "ndim", 0) == 4 else 1
    check_gate("angles", angles, (batch, length, heads, count), "[B, T, H, R]", narrow, q)
    if not 1 <= count <= key_dim // 2:
        raise ValueError(f"angles: expected R from 1 to K / 2 = {key_dim // 2}, got R = {count}")
    shapes = (
        (batch, value_heads, key_dim, value_dim),
        (batch, heads, key_dim),
        (batch, value_heads, value_dim),
    )
    if initial_state is not None:
        if not isinstance(initial_state, tuple) or len(initial_state) != len(shapes):
            raise TypeError(
                "initial_state: expected a TrapezoidalState (s, k, v) or None, got "
                f"{describe(initial_state)}"
            )
        letters = ("[B, HV, K, V]", "[B, H, K]", "[B, HV, V]")
        names = TrapezoidalState._fields
        for name, x, shape, axes in zip(names, initial_state, shapes, letters, strict=True):
            check_gate(f"initial_state.{name}", x, shape, axes, wide, q)
    return shapes


def rotate_pairs(x: Float[Array, "*B K"], angles: Float[Array, "*B R"]) -> Float[Array, "*B K"]:
    """Turns channels `2i` and `2i + 1` by `angles[i]`; the others stay."""
    count = angles.shape[-1]
    pairs = x[..., : 2 * count].reshape(*x.shape[:-1], count, 2)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    even = pairs[..., 0] * cos - pairs[..., 1] * sin
    odd = pairs[..., 0] * sin + pairs[..., 1] * cos
    turned = jnp.stack([even, odd], axis=-1).reshape(*x.shape[:-1], 2 * count)
    return jnp.concatenate([turned, x[..., 2 * count :]], axis=-1)


def _rotate_state(s: Float[Array, "B H G K V"], angles: Float[Array, "B H R"]) -> Array:
    turned = rotate_pairs(jnp.swapaxes(s, -1, -2), angles[:, :, None, None])
    return jnp.swapaxes(turned, -1, -2)


def _scan(
    inputs: _Inputs, state: TrapezoidalState, *, scale: float, chunk_size: int | None
) -> tuple[Float[Array, "B T H G V"], Float[Array, "B HV K V"]]:
    """The definition, step by step, checkpointed in pieces of `chunk_size` steps."""
    batch, length, heads = inputs.k.shape[:3]
    piece = min(chunk_size or math.isqrt(length - 1) + 1, length)
    pieces = split_time(pad_time(inputs, -length % piece), piece)

    def step(carry: TrapezoidalState, x: _Inputs) -> tuple[TrapezoidalState, Array]:
        fresh = x.starts[:, None, None]
        s, k, v = (
            jnp.where(fresh.reshape(batch, *(1,) * (y.ndim - 1)), 0, y) for y in carry
        )  # [B, H, G, K, V], [B, H, K], [B, H, G, V]
        alpha = jnp.exp(x.log_alpha)[..., None, None]
        s = _rotate_state(alpha * s, x.angles)
        s += _rotate_state(alpha * _outer(k, x.before[..., None] * v), x.angles)
        s += _outer(x.k, x.now[..., None] * x.v)
        o = jnp.einsum("bhgkv,bhk->bhgv", s, x.q, precision=lax.Precision.HIGHEST)
        return TrapezoidalState(s, x.k, x.v), scale * o

    def run(carry: TrapezoidalState, piece: _Inputs) -> tuple[TrapezoidalState, Array]:
        return lax.scan(step, carry, piece)

    time_first = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), pieces)  # [NT, C, B, ...]
    s, k, v = state
    carry = TrapezoidalState(
        s.reshape(batch, heads, -1, *s.shape[2:]), k, v.reshape(batch, heads, -1, v.shape[-1])
    )
    carry, o = lax.scan(jax.checkpoint(run, prevent_cse=False), carry, time_first)
    return jnp.moveaxis(o.reshape(-1, *o.shape[2:]), 0, 1)[:, :length], carry.s.reshape(s.shape)


def _outer(k: Float[Array, "B H K"], v: Float[Array, "B H G V"]) -> Float[Array, "B H G K V"]:
    return k[:, :, None, :, None] * v[:, :, :, None, :]


def _chunkwise(
    inputs: _Inputs,
    state: TrapezoidalState,
    v: Float[Array, "B T HV V"],
    *,
    scale: float,
    chunk_size: int | None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
    """As `gated_linear_attention`, see the module."""
    total = _total_angles(inputs.angles)
    later = jnp.pad(inputs.before[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    s, k, v0 = state
    first = inputs.before[:, 0].reshape(v0.shape[:2])[..., None] * v0
    groups = first.reshape(*k.shape[:2], -1, first.shape[-1])
    o, s = run_portable(
        "xla",
        GatedInputs(
            q=rotate_pairs(inputs.q, -total),
            k=rotate_pairs(inputs.k, -total),
            v=inputs.v,
            log_alpha=inputs.log_alpha,
            beta=inputs.now + later,
            p=None,
            starts=inputs.starts,
            own=inputs.now,
        ),
        s + _outer(k, groups).reshape(s.shape),
        v=v,
        delta=False,
        scale=scale,
        chunk_size=chunk_size,
    )
    grouped_state = s.reshape(*k.shape[:2], -1, *s.shape[2:])
    return o, _rotate_state(grouped_state, total[:, -1]).reshape(s.shape)


def _total_angles(angles: Float[Array, "B T H R"]) -> Float[Array, "B T H R"]:
    """Sum of the angles up to each step, every partial sum below a full turn.

    Only differences inside a document count: they keep their digits however many turns there were.
    """
    turn = 2 * math.pi
    return lax.associative_scan(lambda a, b: jnp.mod(a + b, turn), jnp.mod(angles, turn), axis=1)
