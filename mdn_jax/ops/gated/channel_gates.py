"""The delta rule with gates of each channel: Gated DeltaNet-2."""

from typing import get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mdn_jax.ops.arguments import VALUE_DTYPES, check_options
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
    l2_normalize,
    wide_dtypes,
)
from mdn_jax.ops.on_mesh import under_explicit_meshes


@under_explicit_meshes
def gated_delta_rule_2(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    log_alpha: Float[Array, "B T HV K"],
    b: Float[Array, "B T HV K"],
    w: Float[Array, "B T HV V"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B HV K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    normalize_qk: bool = True,
    chunk_size: int | None = None,
    implementation: PortableImplementation | None = None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
    """Gated Delta Rule-2: what is erased and what is written have gates of their own.

        S_t = (I - k_t (b_t * k_t)^T) Diag(alpha_t) S_(t-1) + k_t (w_t * v_t)^T
        o_t = scale S_t^T q_t

    Equation 10 of Gated DeltaNet-2 (arXiv 2605.22791). With `b = w = beta` it is the rule of Kimi
    Delta Attention. Differentiable in every array and through the returned state.

    Args:
      q: queries, float32, bfloat16, float16 or float64.
      k: keys, same shape and dtype as `q`.
      v: values, same dtype. `HV` is a multiple of `H`: value head `h` uses key head `h // (HV/H)`.
      log_alpha: log of the decay of each key channel, at most 0 (nats); float32, or float64 for
        float64 inputs.
      b: erase gate of each key channel, in [0, 1]; any float dtype.
      w: write gate of each value channel, in [0, 1]; any float dtype.
      scale: factor on the output, any finite number; None means `K ** -0.5`.
      initial_state: state before the first step, of the row's first document; None means zeros.
      segment_ids: document of each step, any integers: where they change a document starts, and
        the state is reset.
      normalize_qk: l2-normalise `q` and `k` inside: `x / sqrt(sum(x^2) + 1e-6)`.
      chunk_size: steps in a chunk; None: chosen for the implementation.
      implementation: "scan" (the definition), "xla" (chunkwise), or None: "xla".

    Returns:
      The outputs in `v`'s dtype; the final state, float32 (float64 for float64 inputs), of the last
      document.

    Raises:
      ValueError: a shape, a value or an implementation that does not fit.
      TypeError: a dtype or type that does not fit.
    """
    check_common(q, k, v, segment_ids)
    check_options(scale, chunk_size, implementation, get_args(PortableImplementation))
    (batch, length, heads, key_dim), (value_heads, value_dim) = q.shape, v.shape[2:]
    wide, per_head = wide_dtypes(q), (batch, length, value_heads)
    narrow = (*VALUE_DTYPES[:2], *wide)
    check_gate("log_alpha", log_alpha, (*per_head, key_dim), "[B, T, HV, K]", wide, q)
    check_gate("b", b, (*per_head, key_dim), "[B, T, HV, K]", narrow, q)
    check_gate("w", w, (*per_head, value_dim), "[B, T, HV, V]", narrow, q)
    state_shape = (batch, value_heads, key_dim, value_dim)
    if initial_state is not None:
        check_gate("initial_state", initial_state, state_shape, "[B, HV, K, V]", wide, q)

    compute = compute_dtype(q)
    q, k = q.astype(compute), k.astype(compute)
    if normalize_qk:
        q, k = l2_normalize(q), l2_normalize(k)
    inputs = GatedInputs(
        q=q,
        k=k,
        v=grouped(w, heads, compute) * grouped(v, heads, compute),
        log_alpha=grouped(log_alpha, heads, compute),
        beta=jnp.ones((batch, length, heads, value_heads // heads), compute),
        p=None,
        starts=document_starts(segment_ids, (batch, length)),
        erase=grouped(b, heads, compute) * k[:, :, :, None],
    )
    return run_portable(
        implementation or "xla",
        inputs,
        entering_state(initial_state, state_shape, compute, v),
        v=v,
        delta=True,
        scale=key_dim**-0.5 if scale is None else scale,
        chunk_size=chunk_size,
    )
