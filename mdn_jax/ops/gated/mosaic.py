"""The kernels of jax-linear-attention behind the gated rules, where they are installed.

They are written for NVIDIA Hopper (the extra `mosaic`). Whether they can run a call is
asked of them; what they cannot run goes to another implementation.
"""

import importlib
import importlib.util
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from mdn_jax.ops import api
from mdn_jax.ops.inputs import document_numbers

Kind = Literal["gated_delta", "kimi_delta", "gated_linear"]

SHORT = 16
"""Steps up to which a call is decoding; the kernels work in chunks of 64."""

_IMPLEMENTATION = "mosaic_gpu"


class _Theirs(NamedTuple):
    kind: str  # for jla.ops.linear_attention
    supports: str  # "module:function" that says whether the kernel can run a call


_KINDS: dict[Kind, _Theirs] = {
    "gated_delta": _Theirs(
        "gated_deltanet", "jla.ops.mosaic_gpu.gated_delta_rule:supports_gated_delta_rule"
    ),
    "kimi_delta": _Theirs("kda", "jla.ops.mosaic_gpu.kda:supports_kda"),
    "gated_linear": _Theirs("simple_gla", "jla.ops.mosaic_gpu.scalar_gate:supports_simple_gla"),
}


class Call(NamedTuple):
    """Arrays of a call, as the public functions take them; gates and state in float32."""

    q: Array
    k: Array
    v: Array
    log_alpha: Array
    beta: Array
    state: Array
    segment_ids: Array | None


def lacking(kind: Kind, call: Call, explicit_p: bool, chunk_size: int | None) -> str | None:
    """What the kernels would need that this call lacks; None if they can run it."""
    if api._capability() != (9, 0):
        return "a Hopper GPU (compute capability 9.0) as the default device, got none"
    if importlib.util.find_spec("jla") is None:
        return "jax-linear-attention, which is not installed (mdn-jax's extra 'mosaic')"
    if explicit_p:
        return "p = None, got an erase key"
    if chunk_size not in (None, 64):
        return f"chunk_size 64 or None, got {chunk_size}"
    arrays, options = _arguments(kind, call, scale=1.0, normalize=True)
    module, _, name = _KINDS[kind].supports.partition(":")
    if not getattr(importlib.import_module(module), name)(*arrays, **options):
        return "a call that jax-linear-attention's kernel for it supports (dtype, K, V)"
    return None


def run(kind: Kind, call: Call, *, scale: float, normalize: bool) -> tuple[Array, Array]:
    """Outputs `[B, T, HV, V]` and the final state `[B, HV, K, V]` by the kernels."""
    ids = call.segment_ids
    if ids is not None:  # an id that comes back is another document
        call = call._replace(segment_ids=document_numbers(ids, (ids.shape[0], ids.shape[1])))
    (q, k, v, *gates), options = _arguments(kind, call, scale=scale, normalize=normalize)
    ops = importlib.import_module("jla.ops")
    names = ("g", "beta") if len(gates) == 2 else ("g",)
    o, state = ops.linear_attention(
        _KINDS[kind].kind,
        q,
        k,
        v,
        **dict(zip(names, gates, strict=True)),
        impl=_IMPLEMENTATION,
        **options,
    )
    return o.astype(call.v.dtype), state.astype(call.state.dtype)


def _arguments(
    kind: Kind, call: Call, *, scale: float, normalize: bool
) -> tuple[tuple[Array, ...], dict[str, Any]]:
    """Arrays by position and options of their functions."""
    options: dict[str, Any] = {
        "scale": scale,
        "initial_state": call.state,
        "output_final_state": True,
        "segment_ids": call.segment_ids,
    }
    if kind == "gated_linear":  # no write strength: it goes into the values
        v = (call.beta[..., None] * call.v.astype(jnp.float32)).astype(call.v.dtype)
        return (call.q, call.k, v, call.log_alpha), options
    options["use_qk_l2norm"] = normalize
    return (call.q, call.k, call.v, call.log_alpha, call.beta), options
