"""The gated rules: check their arguments and pick the implementation."""

from functools import partial
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mdn_jax.ops.api import kernels_lack, momentum_delta_rule
from mdn_jax.ops.arguments import VALUE_DTYPES, check_array, check_dtype, check_options
from mdn_jax.ops.context import over_context
from mdn_jax.ops.fallback import reverse_mode_alone, warn_without_backend
from mdn_jax.ops.gated import mosaic
from mdn_jax.ops.gated.inputs import GatedInputs
from mdn_jax.ops.gated.portable import check_common, check_gate, run_portable
from mdn_jax.ops.inputs import (
    compute_dtype,
    document_starts,
    entering_state,
    grouped,
    in_full_precision,
    l2_normalize,
    wide_dtypes,
)
from mdn_jax.ops.on_mesh import under_explicit_meshes
from mdn_jax.ops.state import MDNState

GatedImplementation = Literal["scan", "xla", "mosaic_gpu", "pallas_triton"]

# A log momentum that is a momentum of exactly zero in every dtype, and finite.
_NO_MOMENTUM = -1e4


@under_explicit_meshes
def gated_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    log_alpha: Float[Array, "B T HV"],
    beta: Float[Array, "B T HV"],
    *,
    p: Float[Array, "B T _ K"] | None = None,
    scale: float | None = None,
    initial_state: Float[Array, "B HV K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    normalize_qk: bool = True,
    chunk_size: int | None = None,
    implementation: GatedImplementation | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
    """Gated delta rule: a memory that decays and is corrected by its own error.

        S_t = alpha_t S_(t-1) - beta_t k_t (S_(t-1)^T p_t - v_t)^T      o_t = scale S_t^T q_t

    With `p = alpha k` (None) the rule of Gated DeltaNet (arXiv 2412.06464); with `p = b k` that of
    Comba (arXiv 2506.02475). It is the momentum delta rule at `mu = 0, eta = 1`. Differentiable in
    every array and through the returned state.

    Args:
      q: queries, float32, bfloat16, float16 or float64.
      k: keys, same shape and dtype as `q`.
      v: values, same dtype. `HV` is a multiple of `H`: value head `h` uses key head `h // (HV/H)`.
      log_alpha: log of the decay, at most 0 (nats); float32, or float64 for float64 inputs.
      beta: write strength, at least 0; any float dtype.
      p: erase key with `H` or `HV` heads, used as it is; None means `alpha` times the key `k` as
        the rule uses it.
      scale: factor on the output, any finite number; None means `K ** -0.5`.
      initial_state: state before the first step, of the row's first document; None means zeros.
      segment_ids: document of each step, any integers: where they change a document starts, and
        the state is reset.
      normalize_qk: l2-normalise `q` and `k` inside: `x / sqrt(sum(x^2) + 1e-6)`.
      chunk_size: steps in a chunk; None: chosen for the implementation.
      implementation: "scan" (the definition), "xla" (chunkwise, everywhere), "mosaic_gpu" (kernels
        of jax-linear-attention, where it is installed, on a Hopper GPU), "pallas_triton" (the
        kernels of the momentum delta rule), or None: the best one that supports the call.
      context_axis: mesh axis of a surrounding `jax.shard_map` over which the tokens of a row are
        cut, as of `momentum_delta_rule`; None: the rows are whole.

    Returns:
      The outputs in `v`'s dtype; the final state, float32 (float64 for float64 inputs), of the last
      document.

    Raises:
      ValueError: a shape, a value or an implementation that does not fit.
      TypeError: a dtype or type that does not fit.
    """
    return _run(
        "gated_delta",
        (q, k, v, log_alpha, beta, p),
        initial_state,
        segment_ids,
        scale=scale,
        normalize=normalize_qk,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
    )


@under_explicit_meshes
def kimi_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    log_alpha: Float[Array, "B T HV K"],
    beta: Float[Array, "B T HV"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B HV K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    normalize_qk: bool = True,
    chunk_size: int | None = None,
    implementation: GatedImplementation | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
    """Delta rule with a decay of each key channel (Kimi Delta Attention, arXiv 2510.26692).

        S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_(t-1) + beta_t k_t v_t^T

    Arguments, results and errors are those of `gated_delta_rule`, but for `log_alpha`, which has an
    entry for each key channel, and `implementation`, which cannot be "pallas_triton".
    """
    return _run(
        "kimi_delta",
        (q, k, v, log_alpha, beta, None),
        initial_state,
        segment_ids,
        scale=scale,
        normalize=normalize_qk,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
    )


@under_explicit_meshes
def gated_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    log_alpha: Float[Array, "B T HV"],
    beta: Float[Array, "B T HV"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B HV K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: GatedImplementation | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
    """Linear attention with a decay of each head: Mamba-2's state space (arXiv 2405.21060).

        S_t = alpha_t S_(t-1) + beta_t k_t v_t^T      o_t = scale S_t^T q_t

    In the terms of Mamba-2 `q` is `C`, `k` is `B`, `v` is `x`, `beta` the step `dt`, `log_alpha` is
    `dt A` and `scale` 1. Queries and keys are used as they are. Arguments, results and errors are
    those of `gated_delta_rule`, but for `implementation`, which cannot be "pallas_triton".
    """
    return _run(
        "gated_linear",
        (q, k, v, log_alpha, beta, None),
        initial_state,
        segment_ids,
        scale=scale,
        normalize=False,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
    )


def _run(
    kind: mosaic.Kind,
    arrays: tuple[Array, Array, Array, Array, Array, Array | None],
    initial_state: Array | None,
    segment_ids: Array | None,
    *,
    scale: float | None,
    normalize: bool,
    chunk_size: int | None,
    implementation: GatedImplementation | None,
    context_axis: str | None = None,
) -> tuple[Array, Array]:
    q, k, v, log_alpha, beta, p = arrays
    _check(kind, q, k, v, log_alpha, beta, p, initial_state, segment_ids)
    check_options(scale, chunk_size, implementation, get_args(GatedImplementation))
    batch, length, heads, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    compute = compute_dtype(q)
    log_alpha, beta = jnp.asarray(log_alpha, compute), jnp.asarray(beta, compute)
    state = entering_state(initial_state, (batch, value_heads, key_dim, value_dim), compute, v)
    scale = key_dim**-0.5 if scale is None else scale
    if context_axis is not None:
        run = partial(_by_name, kind, scale=scale, normalize=normalize, chunk_size=chunk_size)
        # the kernels of jax-linear-attention do not take any number of columns
        summary = None if implementation == "mosaic_gpu" else implementation
        with reverse_mode_alone("context_axis", None, context_axis):
            return over_context(
                partial(run, implementation=implementation),
                context_axis,
                {"q": q, "k": k, "v": v, "log_alpha": log_alpha, "beta": beta, "p": p},
                initial_state=state,
                segment_ids=segment_ids,
                summary=partial(run, implementation=summary),
            )

    def lacks(name: GatedImplementation) -> str | None:
        if name == "mosaic_gpu":
            if in_full_precision():
                return 'jax.default_matmul_precision below "highest"'
            call = mosaic.Call(q, k, v, log_alpha, beta, state, segment_ids)
            return mosaic.lacking(kind, call, p is not None, chunk_size)
        if name == "pallas_triton":
            if kind != "gated_delta":
                return "the gated delta rule with a decay of each head"
            return kernels_lack("pallas_triton", q, v, p, scale, chunk_size)
        return None

    if implementation is None:
        order: tuple[GatedImplementation, ...] = ("mosaic_gpu", "pallas_triton", "xla")
        if length <= mosaic.SHORT:  # one kernel that updates the states in place, if there is
            order = ("pallas_triton", "xla")
        implementation = next(name for name in order if lacks(name) is None)
        if implementation == "xla":
            warn_without_backend(lacks("pallas_triton"))
    elif missing := lacks(implementation):
        raise ValueError(
            f'implementation: "{implementation}" expects {missing}; '
            'use implementation="xla", or None for the best one that supports the call'
        )
    if implementation == "mosaic_gpu":
        call = mosaic.Call(q, k, v, log_alpha, beta, state, segment_ids)
        return mosaic.run(kind, call, scale=scale, normalize=normalize)
    if implementation == "pallas_triton":
        o, pair = momentum_delta_rule(
            *(q, k, v, log_alpha, jnp.full_like(log_alpha, _NO_MOMENTUM), beta),
            jnp.ones_like(beta),
            p=p,
            scale=scale,
            initial_state=MDNState(state, jnp.zeros_like(state)),
            segment_ids=segment_ids,
            normalize_qk=normalize,
            implementation="pallas_triton",
        )
        return o, pair.s

    q, k = q.astype(compute), k.astype(compute)
    inputs = GatedInputs(
        q=l2_normalize(q) if normalize else q,
        k=l2_normalize(k) if normalize else k,
        v=grouped(v, heads, compute),
        log_alpha=grouped(log_alpha, heads, compute),
        beta=grouped(beta, heads, compute),
        p=None if p is None else grouped(p, heads, compute),
        starts=document_starts(segment_ids, (batch, length)),
    )
    return run_portable(
        "scan" if implementation == "scan" else "xla",
        inputs,
        state,
        v=v,
        delta=kind != "gated_linear",
        scale=scale,
        chunk_size=chunk_size,
    )


def _by_name(
    kind: mosaic.Kind,
    *,
    initial_state: Array,
    segment_ids: Array | None,
    p: Array | None,
    **arguments: Any,
) -> tuple[Array, Array]:
    """`_run` with its arrays by name."""
    q, k, v, log_alpha, beta = (arguments.pop(x) for x in ("q", "k", "v", "log_alpha", "beta"))
    return _run(kind, (q, k, v, log_alpha, beta, p), initial_state, segment_ids, **arguments)


def _check(
    kind: mosaic.Kind,
    q: Array,
    k: Array,
    v: Array,
    log_alpha: Array,
    beta: Array,
    p: Array | None,
    initial_state: Array | None,
    segment_ids: Array | None,
) -> None:
    """Raises ValueError or TypeError for the first array that does not fit."""
    check_common(q, k, v, segment_ids)
    batch, length, heads, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    wide = wide_dtypes(q)
    per_head = (batch, length, value_heads)
    decays = (*per_head, key_dim) if kind == "kimi_delta" else per_head
    letters = "[B, T, HV, K]" if kind == "kimi_delta" else "[B, T, HV]"
    check_gate("log_alpha", log_alpha, decays, letters, wide, q)
    check_gate("beta", beta, per_head, "[B, T, HV]", (*VALUE_DTYPES[:2], *wide), q)
    if p is not None:
        p_heads = heads if getattr(p, "ndim", 0) == 4 and p.shape[2] == heads else value_heads
        check_array("p", p, (batch, length, p_heads, key_dim), "[B, T, H or HV, K]")
        check_dtype("p", p, (q.dtype.name,), "(as q)")
    if initial_state is not None:
        shape = (batch, value_heads, key_dim, value_dim)
        check_gate("initial_state", initial_state, shape, "[B, HV, K, V]", wide, q)
