"""The GPU kernels behind the operator's arguments: the one place that knows both."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mdn_jax.ops.inputs import document_starts
from mdn_jax.ops.state import CompactState, Kept, MDNState, ReplayState
from pallas_kernels import momentum_delta
from pallas_kernels.momentum_delta import Memory, Ring, Tokens
from pallas_kernels.momentum_delta.types import Exchange
from pallas_kernels.tiling import Tiles


def kernel_rule(
    *,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    log_alpha: Float[Array, "B T HV"],
    log_mu: Float[Array, "B T HV"],
    beta: Float[Array, "B T HV"],
    eta: Float[Array, "B T HV"],
    p: Float[Array, "B T _ K"] | None = None,
    initial_state: Kept | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    normalize_qk: bool = True,
    precise: bool = False,
    tiles: Tiles | None = None,
    pieces: int | None = None,
    capability: tuple[int, int] = (9, 0),
    native: bool = False,
    interpret: bool = False,
    exchange: Exchange | None = None,
    seams: Any = None,
) -> tuple[Float[Array, "B T HV V"], Any]:
    """`momentum_delta_rule` on the kernels; its arguments are not checked.

    Args:
      q: as the arrays below, that of `momentum_delta_rule`; gates and states are float32.
      k: keys.
      v: values.
      log_alpha: log of the decay.
      log_mu: log of the momentum.
      beta: step size.
      eta: write scale.
      p: erase key; None means `alpha` times the key.
      initial_state: entering state; None means zeros; a `CompactState` for up to 16 steps.
      segment_ids: document of each step.
      scale: factor on the output; None means `K ** -0.5`.
      normalize_qk: l2-normalise `q` and `k`.
      precise: of bfloat16 inputs: the chunk kernels keep float32 between them.
      tiles: of the chunk kernels; None: chosen for the shape.
      pieces: that the state passes cut a row in; None: chosen for the shape.
      capability: compute capability of the device.
      native: the decode kernel in native Triton.
      interpret: in Pallas' interpreter, on any device.
      exchange: where every device has a stretch of each row (`mdn_jax.ops.context.Stretches`);
        None: rows are whole.
      seams: what `exchange` is told.

    Returns:
      The outputs in `v`'s dtype, and the final state in float32, or a `CompactState` as came.
    """
    starts: Bool[Array, "B T"] | None = None
    if segment_ids is not None:
        starts = document_starts(segment_ids, (v.shape[0], v.shape[1]))
    o, memory = momentum_delta.momentum_delta(
        Tokens(q, k, v, p, log_alpha, log_mu, beta, eta),
        None if initial_state is None else Memory(*initial_state),
        starts=starts,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        normalize=normalize_qk,
        precise=precise,
        tiles=tiles,
        pieces=pieces,
        capability=capability,
        native=native,
        interpret=interpret,
        exchange=exchange,
        seams=seams,
    )
    if isinstance(initial_state, CompactState):
        return o, CompactState(*memory)
    return o, MDNState(memory.s, memory.m)


def kernel_replay(
    state: ReplayState,
    x: tuple[Any, Array],
    *,
    scale: float,
    normalize: bool,
    interpret: bool = False,
) -> tuple[ReplayState, Array]:
    """One step of `replay_steps` on its kernel; its arguments are not checked.

    Args:
      state: with padded dims.
      x: `q, k, v, p` and the gates `[B, ...]`, and the rows that are active.
      scale: factor on the output.
      normalize: l2-normalise `q` and `k`.
      interpret: in Pallas' interpreter, on any device.

    Returns:
      The state after and the outputs `[B, HV, V]`.
    """
    arrays, active = x
    tokens = Tokens(*(None if y is None else y[:, None] for y in arrays))
    base = state.base
    out = momentum_delta.replay_step(
        tokens,
        Memory(*base),
        Ring(*state[1:]),
        active.astype(jnp.int32),
        scale=scale,
        normalize=normalize,
        interpret=interpret,
    )
    kept = (
        CompactState(*out.memory) if isinstance(base, CompactState) else MDNState(*out.memory[:2])
    )
    return ReplayState(kept, *out.ring), out.o[:, 0]
