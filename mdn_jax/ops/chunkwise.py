"""The chunk algorithm in plain XLA: exact in every gate regime, on a CPU, a TPU or any GPU.

Everything that does not depend on the entering states is computed for all chunks at once
(`_prepare`); a scan over the chunks then does only what is sequential (`_advance`).
Formulas: docs/algorithm.md. Internally `N = -M`, so that every coefficient is non-negative.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mdn_jax.ops.coefficients import ChunkCoefficients, chunk_coefficients
from mdn_jax.ops.inputs import RuleInputs, pad_time, split_time
from mdn_jax.ops.state import MDNState

_exact_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class _Chunk(NamedTuple):
    """What one chunk needs to advance the states; heads before time."""

    q: Float[Array, "B H C K"]
    k: Float[Array, "B H C K"]
    v: Float[Array, "B H G C V"]
    p: Float[Array, "B H P C K"] | None
    inverse: Float[Array, "B H G C C"]  # (I + L)^-1
    read_s: Float[Array, "B H G C"]  # factors of the rows P S_0, P N_0 in the error
    read_n: Float[Array, "B H G C"]
    query_s: Float[Array, "B H G C"]  # factors of the rows Q S_0, Q N_0 in the output
    query_n: Float[Array, "B H G C"]
    write_s: Float[Array, "B H G C"]  # factors of the errors in the final states
    write_n: Float[Array, "B H G C"]
    keep_ss: Float[Array, "B H G"]  # S_C = keep_ss S_0 + keep_ns N_0 + ...
    keep_ns: Float[Array, "B H G"]
    keep_nn: Float[Array, "B H G"]  # N_C = keep_nn N_0 + ...


def default_chunk_size() -> int:
    """32 on a CPU, where products inside a chunk cost most; 64 elsewhere."""
    return 32 if jax.default_backend() == "cpu" else 64


def chunkwise_rule(
    inputs: RuleInputs,
    state: MDNState,
    *,
    scale: float,
    chunk_size: int | None,
    precision: lax.Precision,
) -> tuple[Array, MDNState]:
    """Runs the rule chunk by chunk.

    Both parts are rematerialised in the backward pass: the residuals are the inputs, two `[C, C]`
    matrices and one pair of states a chunk, `O(T (K + V + C) + T/C K V)` a head.

    Args:
      inputs: prepared inputs (see `RuleInputs`), in the dtype to compute in.
      state: entering state.
      scale: factor on the output.
      chunk_size: steps in a chunk; None: see `default_chunk_size`. A shorter sequence is one chunk
        of its own length.
      precision: of the products with K- and V-sized operands; coefficients are always exact.

    Returns:
      Outputs `[B, T, H, G, V]` and the final state.
    """
    batch, length, heads, groups, value_dim = inputs.v.shape
    chunk = min(chunk_size or default_chunk_size(), length)
    chunks = _heads_first(split_time(pad_time(inputs, -length % chunk), chunk))

    prepare = jax.checkpoint(partial(_prepare, precision=precision))
    advance = jax.checkpoint(partial(_advance, precision=precision), prevent_cse=False)
    operands, attention = prepare(chunks)
    grouped = (batch, heads, groups, inputs.k.shape[-1], value_dim)
    carry = jnp.concatenate([state.s.reshape(grouped), -state.m.reshape(grouped)], axis=-1)
    carry, (error, o) = lax.scan(advance, carry, operands)
    o = scale * (o + jnp.einsum("nbhgtj,nbhgjv->nbhgtv", attention, error, precision=precision))
    o = o.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, groups, value_dim)[:, :length]
    s, n = jnp.split(carry, 2, axis=-1)
    return o, MDNState(s=s.reshape(state.s.shape), m=-n.reshape(state.m.shape))


def _heads_first(chunks: RuleInputs) -> RuleInputs:
    """`[NT, B, C, heads..., ...] -> [NT, B, heads..., C, ...]`, each array copied once.

    The barrier keeps XLA from making the copy anew, in another layout, for each use.
    """
    moved = RuleInputs(
        q=jnp.moveaxis(chunks.q, 2, 3),
        k=jnp.moveaxis(chunks.k, 2, 3),
        v=jnp.moveaxis(chunks.v, 2, 4),
        log_alpha=jnp.moveaxis(chunks.log_alpha, 2, 4),
        log_mu=jnp.moveaxis(chunks.log_mu, 2, 4),
        beta=jnp.moveaxis(chunks.beta, 2, 4),
        eta=jnp.moveaxis(chunks.eta, 2, 4),
        p=None if chunks.p is None else jnp.moveaxis(chunks.p, 2, 4),
        starts=chunks.starts,
    )
    return lax.optimization_barrier(moved)


def _prepare(x: RuleInputs, *, precision: lax.Precision) -> tuple[_Chunk, Array]:
    """The operands of every chunk, and `tril(Q K^T * gamma * eta)`; see `_heads_first`."""
    q, k, p, eta = x.q, x.k, x.p, x.eta
    starts = x.starts[:, :, None, None]
    co: ChunkCoefficients = chunk_coefficients(x.log_alpha, x.log_mu, x.beta, starts)
    scores = jnp.einsum("nbhtk,nbhjk->nbhtj", q, k, precision=precision)[:, :, :, None]

    if p is None:  # alpha k: only scales the rows of k
        erase = jnp.exp(x.log_alpha)
        overlap = jnp.einsum("nbhtk,nbhjk->nbhtj", k, k, precision=precision)[:, :, :, None]
    else:
        erase = jnp.ones_like(x.log_alpha)
        overlap = jnp.einsum("nbhgtk,nbhjk->nbhgtj", p, k, precision=precision)
    lower = overlap * co.gamma_before * erase[..., None] * eta[..., None, :]
    chunk = _Chunk(
        q=q,
        k=k,
        v=x.v,
        p=p,
        inverse=unit_lower_inverse(lower),
        read_s=erase * co.decay_before,
        read_n=erase * co.lead_before,
        query_s=co.decay,
        query_n=co.lead,
        write_s=eta * co.gamma[..., -1, :],
        write_n=eta * co.carry_last,
        keep_ss=co.decay[..., -1],
        keep_ns=co.lead[..., -1],
        keep_nn=co.momentum_last,
    )
    return chunk, scores * co.gamma * eta[..., None, :]


def _advance(
    states: Float[Array, "B H G K 2*V"], x: _Chunk, *, precision: lax.Precision
) -> tuple[Array, tuple[Array, Array]]:
    """One chunk: the next `[S | N]`, the errors `v'` and the output's part from the states."""
    chunk = x.k.shape[-2]
    read = partial(jnp.einsum, precision=precision)
    if x.p is None:
        both = read("bhtk,bhgkv->bhgtv", jnp.concatenate([x.k, x.q], axis=-2), states)
        erased, queried = both[..., :chunk, :], both[..., chunk:, :]
    else:
        p = jnp.broadcast_to(x.p, (*states.shape[:3], *x.p.shape[3:]))
        erased = read("bhgtk,bhgkv->bhgtv", p, states)
        queried = read("bhtk,bhgkv->bhgtv", x.q, states)

    def mix(by_s: Array, by_n: Array, rows: Array) -> Array:
        of_s, of_n = jnp.split(rows, 2, axis=-1)
        return by_s[..., None] * of_s + by_n[..., None] * of_n

    residual = x.v - mix(x.read_s, x.read_n, erased)
    error = jnp.einsum("bhgtj,bhgjv->bhgtv", x.inverse, residual, precision=precision)
    writes = jnp.concatenate([x.write_s[..., None] * error, x.write_n[..., None] * error], -1)
    s, n = jnp.split(states, 2, axis=-1)
    keep_ss, keep_ns, keep_nn = (c[..., None, None] for c in (x.keep_ss, x.keep_ns, x.keep_nn))
    kept = jnp.concatenate([keep_ss * s + keep_ns * n, keep_nn * n], axis=-1)
    states = kept + read("bhjk,bhgjv->bhgkv", x.k, writes)
    return states, (error, mix(x.query_s, x.query_n, queried))


@jax.custom_jvp
def unit_lower_inverse(lower: Float[Array, "*h C C"]) -> Float[Array, "*h C C"]:
    """`(I + L)^-1` for strictly lower triangular `L`, as stable as forward substitution.

    (Sums of powers of `L` would cancel when keys are nearly parallel.)
    """
    return _unit_lower_inverse(lower)


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(primals[0])
    change = _exact_einsum("...ij,...jk->...ik", tangents[0], inverse)
    return inverse, -_exact_einsum("...ij,...jk->...ik", inverse, change)


def _unit_lower_inverse(lower: Array, base: int = 16) -> Array:
    """Halves are inverted together and joined, `[[X1, 0], [-X2 L21 X1, X2]]`."""
    size = lower.shape[-1]
    if size <= base:
        eye = jnp.eye(size, dtype=lower.dtype)
        rows = [jnp.broadcast_to(eye[0], lower.shape[:-1])]
        for i in range(1, size):
            above = jnp.stack(rows, axis=-2)
            rows.append(eye[i] - _exact_einsum("...j,...jk->...k", lower[..., i, :i], above))
        return jnp.stack(rows, axis=-2)
    if size % 2:  # a row and column of zeros make the halves equal
        padded = jnp.pad(lower, [(0, 0)] * (lower.ndim - 2) + [(0, 1), (0, 1)])
        return _unit_lower_inverse(padded, base)[..., :-1, :-1]
    half = size // 2
    halves = jnp.stack([lower[..., :half, :half], lower[..., half:, half:]])
    first, second = _unit_lower_inverse(halves, base)
    corner = _exact_einsum("...ij,...jk->...ik", lower[..., half:, :half], first)
    corner = -_exact_einsum("...ij,...jk->...ik", second, corner)
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)
