"""The chunk algorithm in plain XLA: exact in every gate regime, on a CPU, a TPU or any GPU.

Time is cut into blocks of chunks. In a block, everything that does not depend on the entering
states is computed for all its chunks at once, `walk` does what is sequential, and the outputs
follow for all chunks at once. Only the states between blocks are kept for the backward pass, which
runs each block again: what is live at any time is the inputs and one block.

Formulas: docs/algorithm.md. Internally `N = -M`, so that every coefficient is non-negative.
Differentiable in reverse mode, any number of times; for forward mode (`jax.jvp`) use the scan.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mdn_jax.ops.chunk_states import Walk, read_states, walk
from mdn_jax.ops.coefficients import ChunkCoefficients, chunk_coefficients
from mdn_jax.ops.inputs import RuleInputs, pad_time, split_time
from mdn_jax.ops.state import MDNState


class _Options(NamedTuple):
    chunk: int  # steps in a chunk
    block: int  # steps in a block, a multiple of `chunk`
    precision: lax.Precision


def default_chunk_size() -> int:
    """32 on a CPU, where products inside a chunk cost most; 64 elsewhere."""
    return 32 if jax.default_backend() == "cpu" else 64


def largest_block() -> int:
    """Steps: on a CPU a block should stay in the cache; elsewhere it should fill the device."""
    return 128 if jax.default_backend() == "cpu" else 512


def chunkwise_rule(
    inputs: RuleInputs,
    state: MDNState,
    *,
    scale: float | Array,
    chunk_size: int | None,
    precision: lax.Precision,
) -> tuple[Array, MDNState]:
    """Runs the rule chunk by chunk.

    The residuals of the backward pass are the inputs and one pair of states a block.

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
    chunk = chunk_size or default_chunk_size()
    most = max(1, largest_block() // chunk)  # chunks of a block
    if jax.export.is_symbolic_dim(length):
        block = most * chunk
        blocks = (length + block - 1) // block  # which is known to be 1 at least
    else:
        chunk = min(chunk, length)
        chunks = -(-length // chunk)
        blocks = -(-chunks // most)
        block = -(-chunks // blocks) * chunk  # even blocks: the least padding
    inputs = pad_time(inputs._replace(q=scale * inputs.q), blocks * block - length)

    grouped = (batch, heads, groups, inputs.k.shape[-1], value_dim)
    states = jnp.concatenate([state.s.reshape(grouped), -state.m.reshape(grouped)], axis=-2)
    states, o = _run_blocks_compiled(states, inputs, _Options(chunk, block, precision))
    s, n = jnp.split(states, 2, axis=-2)
    final = MDNState(s=s.reshape(state.s.shape), m=-n.reshape(state.m.shape))
    return o[:, :length], final


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _run_blocks(
    states: Float[Array, "B H G 2*K V"], inputs: RuleInputs, options: _Options
) -> tuple[Array, Array]:
    """Final `[S; N]` and the outputs `[B, T, H, G, V]`; `T` is a multiple of the block."""
    (states, o), _ = _scan_blocks(states, inputs, options)
    return states, o


def _scan_blocks(
    states: Array, inputs: RuleInputs, options: _Options
) -> tuple[tuple[Array, Array], Array]:
    """`_run_blocks`, and the states that enter each block."""

    def step(carry: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], Array]:
        states, o = carry
        after, part = _block(states, _take(inputs, start, options.block), options)
        return (after, lax.dynamic_update_slice_in_dim(o, part, start, axis=1)), states

    return lax.scan(step, (states, jnp.zeros_like(inputs.v)), _block_starts(inputs, options))


def _run_blocks_forward(
    states: Array, inputs: RuleInputs, options: _Options
) -> tuple[tuple[Array, Array], tuple[Array, RuleInputs]]:
    outputs, entering = _scan_blocks(states, inputs, options)
    return outputs, (entering, inputs)


def _run_blocks_backward(
    options: _Options, residuals: tuple[Array, RuleInputs], cotangents: tuple[Array, Array]
) -> tuple[Array, RuleInputs]:
    entering, inputs = residuals
    d_states, d_o = cotangents
    nothing: Any = None  # whether a document starts has no gradient
    arrays = inputs._replace(starts=nothing)
    d_arrays = jax.tree.map(jnp.zeros_like, arrays)

    def step(
        carry: tuple[Array, RuleInputs], x: tuple[Array, Array]
    ) -> tuple[tuple[Array, RuleInputs], None]:
        d_states, d_arrays = carry
        states, start = x
        starts = _take(inputs.starts, start, options.block)
        _, pull = jax.vjp(
            lambda states, part: _block(states, part._replace(starts=starts), options),
            states,
            _take(arrays, start, options.block),
        )
        d_states, d_part = pull((d_states, _take(d_o, start, options.block)))
        put = partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return (d_states, jax.tree.map(put, d_arrays, d_part)), None

    (d_states, d_arrays), _ = lax.scan(
        step, (d_states, d_arrays), (entering, _block_starts(inputs, options)), reverse=True
    )
    return d_states, d_arrays


_run_blocks.defvjp(_run_blocks_forward, _run_blocks_backward)

# outside of jit, too, compiled once for all calls alike
_run_blocks_compiled = jax.jit(_run_blocks, static_argnums=2)


def _block_starts(inputs: RuleInputs, options: _Options) -> Array:
    return options.block * jnp.arange(inputs.v.shape[1] // options.block)


def _take[Tree](x: Tree, start: Array, count: int) -> Tree:
    """`count` steps from `start` of every array `[B, T, ...]`."""
    return jax.tree.map(lambda y: lax.dynamic_slice_in_dim(y, start, count, axis=1), x)


def _heads_first(chunks: RuleInputs) -> RuleInputs:
    """`[NT, B, C, heads..., ...] -> [NT, B, heads..., C, ...]`; `q`, `k` get an axis for `G`."""
    return RuleInputs(
        q=jnp.moveaxis(chunks.q, 2, 3)[:, :, :, None],
        k=jnp.moveaxis(chunks.k, 2, 3)[:, :, :, None],
        v=jnp.moveaxis(chunks.v, 2, 4),
        log_alpha=jnp.moveaxis(chunks.log_alpha, 2, 4),
        log_mu=jnp.moveaxis(chunks.log_mu, 2, 4),
        beta=jnp.moveaxis(chunks.beta, 2, 4),
        eta=jnp.moveaxis(chunks.eta, 2, 4),
        p=None if chunks.p is None else jnp.moveaxis(chunks.p, 2, 4),
        starts=chunks.starts,
    )


def _block(
    states: Float[Array, "B H G 2*K V"], inputs: RuleInputs, options: _Options
) -> tuple[Array, Array]:
    """The chunks of one block: the next `[S; N]` and the outputs `[B, T, H, G, V]`."""
    x = _heads_first(split_time(inputs, options.chunk))
    matmul = partial(jnp.matmul, precision=options.precision)
    co: ChunkCoefficients = chunk_coefficients(
        x.log_alpha, x.log_mu, x.beta, x.starts[:, :, None, None]
    )
    if x.p is None:  # alpha k: only scales the rows of k
        p, erase = x.k, jnp.exp(x.log_alpha)
    else:
        p, erase = x.p, jnp.ones_like(x.log_alpha)
    keys = jnp.swapaxes(x.k, -1, -2)
    lower = matmul(p, keys) * co.gamma_before * (erase[..., None] * x.eta[..., None, :])
    attention = matmul(x.q, keys) * co.gamma * x.eta[..., None, :]
    states, entering, v_new = walk(
        states,
        Walk(
            p=p,
            k=x.k,
            v=x.v,
            lower=lower,
            read=jnp.stack([erase * co.decay_before, erase * co.lead_before], axis=-1),
            write=jnp.stack([x.eta * co.gamma[..., -1, :], x.eta * co.carry_last], axis=-1),
            scalars=jnp.stack([co.decay[..., -1], co.lead[..., -1], co.momentum_last], axis=-1),
        ),
        options.precision,
    )
    factors = jnp.stack([co.decay, co.lead], axis=-1)
    o = read_states(x.q, factors, entering, options.precision)
    o += matmul(attention, v_new)  # [NT, B, H, G, C, V]
    return states, o.transpose(1, 0, 4, 2, 3, 5).reshape(inputs.v.shape)
