"""The momentum delta rule on any device: what is around the scan and the chunk algorithm."""

from typing import Any

from jaxtyping import Array

from mdn_jax.ops.chunkwise import chunkwise_rule
from mdn_jax.ops.inputs import (
    RuleInputs,
    compute_dtype,
    document_starts,
    entering_state,
    grouped,
    l2_normalize,
    product_precision,
)
from mdn_jax.ops.scan import scan_rule
from mdn_jax.ops.state import MDNState


def portable_rule(
    arrays: tuple[Any, ...],
    state: MDNState | None,
    segment_ids: Array | None,
    *,
    scale: float | Array,
    normalize: bool,
    chunk_size: int | None,
    definition: bool,
) -> tuple[Array, MDNState]:
    """The definition, or the chunk algorithm."""
    q, k, v, p, *gates = arrays
    batch, _, heads, key_dim = q.shape
    compute = compute_dtype(q)
    shape = (batch, v.shape[2], key_dim, v.shape[3])
    state = MDNState(*(entering_state(x, shape, compute, v) for x in state or (None, None)))
    q, k = q.astype(compute), k.astype(compute)
    log_alpha, log_mu, beta, eta = (grouped(x, heads, compute) for x in gates)
    inputs = RuleInputs(
        q=l2_normalize(q) if normalize else q,
        k=l2_normalize(k) if normalize else k,
        v=grouped(v, heads, compute),
        log_alpha=log_alpha,
        log_mu=log_mu,
        beta=beta,
        eta=eta,
        p=None if p is None else grouped(p, heads, compute),
        starts=document_starts(segment_ids, (batch, q.shape[1])),
    )
    if definition or q.shape[1] == 1:  # one step is no chunk
        o, state = scan_rule(inputs, state, scale=scale, chunk_size=chunk_size)
    else:
        precision = product_precision(v)
        o, state = chunkwise_rule(
            inputs, state, scale=scale, chunk_size=chunk_size, precision=precision
        )
    return o.reshape(v.shape).astype(v.dtype), state
