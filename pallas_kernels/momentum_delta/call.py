"""Any shape on the kernels: padding, resets at document starts, tile choice."""

import jax
import jax.numpy as jnp

from pallas_kernels.momentum_delta.layout import CHUNK, Options, States, Tokens
from pallas_kernels.momentum_delta.vjp import rule
from pallas_kernels.tiling import Tiles, choose_tiles, padded_key_dim, padded_value_dim

# exp of this is zero in float32; small enough in size that sums over a chunk stay precise
_LOG_ZERO = -110.0


def momentum_delta(
    x: Tokens,
    state: States,
    *,
    starts: jax.Array | None,
    scale: float,
    normalize: bool,
    tiles: Tiles | None = None,
    capability: tuple[int, int] = (9, 0),
    interpret: bool = False,
) -> tuple[jax.Array, States]:
    """The momentum delta rule on the Pallas kernels, differentiable in every array.

    Args:
      x: tokens and gates, any `T`, `K <= 256`, `V <= 512`.
      state: entering states, float32, with the momentum negated.
      starts: `[B, T]` bool, the first step of each document but a row's first; or None.
      scale: factor on the output.
      normalize: l2-normalise q and k.
      tiles: None: chosen for the shape.
      capability: compute capability of the device.
      interpret: run the kernels in the interpreter.

    Returns:
      Outputs `[B, T, HV, V]` in v's dtype and the final states, float32, momentum negated.
    """
    z = x.sizes
    key_dim, value_dim = padded_key_dim(z.key_dim), padded_value_dim(z.value_dim)
    tiles = tiles or choose_tiles(
        key_dim, value_dim, x.q.dtype.itemsize, capability, explicit_p=x.p is not None
    )
    x = _pad(_reset(x, starts), -z.length % CHUNK, key_dim - z.key_dim, value_dim - z.value_dim)
    margin = ((0, 0), (0, 0), (0, key_dim - z.key_dim), (0, value_dim - z.value_dim))
    state = jax.tree.map(lambda y: jnp.pad(y, margin), state)
    o, final = rule(Options(scale, normalize, tiles, interpret), x, state)
    final = jax.tree.map(lambda y: y[:, :, : z.key_dim, : z.value_dim], final)
    return o[:, : z.length, :, : z.value_dim], final


def _reset(x: Tokens, starts: jax.Array | None) -> Tokens:
    """Gates of zero at the first step of a document: it sees no state, and exactly none.

    The kernels take differences of cumulative log gates, so these are bounded below.
    """
    gates = {
        "log_alpha": jnp.maximum(x.log_alpha, _LOG_ZERO),
        "log_mu": jnp.maximum(x.log_mu, _LOG_ZERO),
    }
    if starts is None:
        return x._replace(**gates)
    gates = {name: jnp.where(starts[:, :, None], _LOG_ZERO, y) for name, y in gates.items()}
    p = None if x.p is None else jnp.where(starts[:, :, None, None], 0, x.p)
    return x._replace(p=p, **gates)


def _pad(x: Tokens, steps: int, key_dim: int, value_dim: int) -> Tokens:
    """Appends steps that leave the states as they are, and zeros to keys and values."""

    def pad(y: jax.Array, width: int = 0) -> jax.Array:
        if not steps and not width:
            return y
        margin = [(0, 0), (0, steps), (0, 0), (0, width)][: y.ndim]
        return jnp.pad(y, margin)

    return Tokens(
        pad(x.q, key_dim),
        pad(x.k, key_dim),
        pad(x.v, value_dim),
        None if x.p is None else pad(x.p, key_dim),
        *(pad(gate) for gate in x[4:]),
    )
