"""The sequential part of the chunk algorithm, the states from chunk to chunk, and its gradient.

Forward and backward, the two scans hold only the lines that need the states of the chunk before
(docs/algorithm.md, sections 2 and 5); all else is done for many chunks at once.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

_exact_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)

_UNROLLED = 4  # up to so many chunks without a loop: no zeroed buffers, less time on a CPU


class Walk(NamedTuple):
    """What the chunks need to carry the states; heads before time.

    With the states as `Z = [S; N]` and `rows ⊙ factors` for `scale_rows`:

        V' = (I + L)^-1 (V - (P ⊙ read) Z)
        S_C = decay S + lead N + (K ⊙ write_0)^T V'
        N_C = momentum N       + (K ⊙ write_1)^T V'
    """

    p: Float[Array, "NT B H P C K"]  # P = 1 (shared by a group) or G
    k: Float[Array, "NT B H 1 C K"]
    v: Float[Array, "NT B H G C V"]
    lower: Float[Array, "NT B H G C C"]  # L, strictly lower triangular
    read: Float[Array, "NT B H G C 2"]  # factors of P S, P N in the residual
    write: Float[Array, "NT B H G C 2"]  # factors of v_new in S_C, N_C
    scalars: Float[Array, "NT B H G 3"]  # decay, lead, momentum at the end of the chunk


def clean(x: Array, dead: Bool[Array, "..."]) -> Array:
    """`x`, with zero for what is not finite where a factor of exactly zero stands before it.

    A document that starts multiplies all of earlier ones by zero, and zero times nan is nan: what
    belongs to another document is selected away. Finite numbers stay as they are, to the bit.
    """
    return jnp.where(dead & ~jnp.isfinite(x), 0, x)


def scale_rows(rows: Float[Array, "*#h C K"], factors: Float[Array, "*h C 2"]) -> Array:
    """`[first factor * rows | second factor * rows]`, `[..., C, 2 K]`."""
    scaled = factors[..., None] * rows[..., None, :]
    return scaled.reshape(*scaled.shape[:-2], -1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def walk(
    states: Float[Array, "B H G 2*K V"], x: Walk, precision: lax.Precision
) -> tuple[Array, Array, Array]:
    """Takes the states through the chunks.

    Args:
      states: `[S; N]` before the first chunk.
      x: the chunks.
      precision: of the products with K- and V-sized operands.

    Returns:
      `[S; N]` after the last chunk, `[S; N]` before each `[NT, B, H, G, 2 K, V]`, and
      `V'`, `[NT, B, H, G, C, V]`.
    """
    return _walk(states, x, unit_lower_inverse(x.lower), precision)


def _walk(
    states: Array, x: Walk, inverse: Array, precision: lax.Precision
) -> tuple[Array, Array, Array]:
    matmul = partial(jnp.matmul, precision=precision)

    def step(states: Array, chunk: tuple[Walk, Array]) -> tuple[Array, tuple[Array, Array]]:
        x, inverse = chunk
        seen = clean(matmul(scale_rows(x.p, x.read), states), _forgets(x))
        v_new = matmul(inverse, x.v - seen)
        written = matmul(jnp.swapaxes(scale_rows(x.k, x.write), -1, -2), v_new)
        s, n = jnp.split(states, 2, axis=-2)
        decay, lead, momentum = _scalars(x)
        kept = clean(jnp.concatenate([decay * s + lead * n, momentum * n], axis=-2), _forgets(x))
        return kept + written, (states, v_new)

    unroll = inverse.shape[0] <= _UNROLLED
    states, (entering, v_new) = lax.scan(step, states, (x, inverse), unroll=unroll)
    return states, entering, v_new


def _forgets(x: Walk) -> Bool[Array, "*h 1 1"]:
    """Whether a chunk keeps exactly nothing of the states: a document starts in it."""
    return jnp.all(x.scalars == 0, axis=-1)[..., None, None]


def _scalars(x: Walk) -> tuple[Array, Array, Array]:
    decay, lead, momentum = (x.scalars[..., i, None, None] for i in range(3))
    return decay, lead, momentum


def _walk_forward(
    states: Array, x: Walk, precision: lax.Precision
) -> tuple[tuple[Array, Array, Array], tuple[Walk, Array, Array, Array]]:
    inverse = unit_lower_inverse(x.lower)
    states, entering, v_new = _walk(states, x, inverse, precision)
    return (states, entering, v_new), (x, inverse, entering, v_new)


def _walk_backward(
    precision: lax.Precision,
    residuals: tuple[Walk, Array, Array, Array],
    cotangents: tuple[Array, Array, Array],
) -> tuple[Array, Walk]:
    matmul = partial(jnp.matmul, precision=precision)
    x, inverse, entering, v_new = residuals
    d_states, d_entering, d_v_new = cotangents

    def step(
        d_states: Array, chunk: tuple[Walk, Array, Array, Array]
    ) -> tuple[Array, tuple[Array, Array]]:
        x, inverse, d_entering, d_v_new = chunk
        d_v_new = d_v_new + clean(matmul(scale_rows(x.k, x.write), d_states), _forgets(x))
        d_residual = matmul(jnp.swapaxes(inverse, -1, -2), d_v_new)
        read = matmul(jnp.swapaxes(scale_rows(x.p, x.read), -1, -2), d_residual)
        d_s, d_n = jnp.split(d_states, 2, axis=-2)
        decay, lead, momentum = _scalars(x)
        kept = clean(
            jnp.concatenate([decay * d_s, lead * d_s + momentum * d_n], axis=-2), _forgets(x)
        )
        return kept + d_entering - read, (d_states, d_residual)

    d_first, (d_leaving, d_residual) = lax.scan(
        step,
        d_states,
        (x, inverse, d_entering, d_v_new),
        reverse=True,
        unroll=inverse.shape[0] <= _UNROLLED,
    )
    d_k, d_write = _scale_rows_gradient(
        matmul(v_new, jnp.swapaxes(d_leaving, -1, -2)), x.k, x.write
    )
    d_p, d_read = _scale_rows_gradient(
        -matmul(d_residual, jnp.swapaxes(entering, -1, -2)), x.p, x.read
    )
    s, n = jnp.split(entering, 2, axis=-2)
    d_s, d_n = jnp.split(d_leaving, 2, axis=-2)
    d_scalars = [jnp.sum(d * y, axis=(-2, -1)) for d, y in ((d_s, s), (d_s, n), (d_n, n))]
    forgets = _forgets(x)[..., 0]
    return d_first, Walk(
        p=d_p,
        k=d_k,
        v=d_residual,
        lower=-matmul(d_residual, jnp.swapaxes(v_new, -1, -2)),
        read=d_read,
        write=d_write,
        scalars=clean(jnp.stack(d_scalars, axis=-1), forgets),
    )


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def read_states(
    rows: Float[Array, "*#h C K"],
    factors: Float[Array, "*h C 2"],
    states: Float[Array, "*h 2*K V"],
    precision: lax.Precision,
) -> Float[Array, "*h C V"]:
    """`(rows ⊙ factors) states`: exactly nothing where both factors of a row are zero."""
    product = jnp.matmul(scale_rows(rows, factors), states, precision=precision)
    return clean(product, jnp.all(factors == 0, axis=-1, keepdims=True))


def _read_states_forward(
    rows: Array, factors: Array, states: Array, precision: lax.Precision
) -> tuple[Array, tuple[Array, Array, Array]]:
    return read_states(rows, factors, states, precision), (rows, factors, states)


def _read_states_backward(
    precision: lax.Precision, residuals: tuple[Array, Array, Array], d_o: Array
) -> tuple[Array, Array, Array]:
    rows, factors, states = residuals
    matmul = partial(jnp.matmul, precision=precision)
    d_scaled = matmul(d_o, jnp.swapaxes(states, -1, -2))
    d_rows, d_factors = _scale_rows_gradient(d_scaled, rows, factors)
    d_states = matmul(jnp.swapaxes(scale_rows(rows, factors), -1, -2), d_o)
    return d_rows, d_factors, d_states


read_states.defvjp(_read_states_forward, _read_states_backward)


def _scale_rows_gradient(d_scaled: Array, rows: Array, factors: Array) -> tuple[Array, Array]:
    """Gradients of `scale_rows` in `rows` (summed over the heads that share them) and `factors`."""
    d_scaled = clean(d_scaled, jnp.all(factors == 0, axis=-1, keepdims=True))
    first, second = jnp.split(d_scaled, 2, axis=-1)
    d_factors = jnp.stack([jnp.sum(first * rows, -1), jnp.sum(second * rows, -1)], axis=-1)
    d_rows = factors[..., :1] * first + factors[..., 1:] * second
    if rows.shape[-3] != d_rows.shape[-3]:
        d_rows = jnp.sum(d_rows, axis=-3, keepdims=True)
    return d_rows, d_factors


walk.defvjp(_walk_forward, _walk_backward)


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


def _unit_lower_inverse(lower: Array, base: int = 8) -> Array:
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
