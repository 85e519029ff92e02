"""The gates and states of a model's layers on given tokens."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mdn_jax.layers.gates import Gates
from mdn_jax.layers.momentum_deltanet import MDNCache, MomentumDeltaNet
from mdn_jax.models.causal_lm import MDNForCausalLM, ModelCache
from mdn_jax.ops.state import MDNState, full


class LayerRecord(NamedTuple):
    """What an MDN layer did; a pytree.

    Attributes:
      gates: of every step and value head, `[B, T, HV]`.
      erase: the erase key times the normalised key, `[B, T, HV]`: `alpha`, or 1 with
        `use_p_times_alpha=False`, but for the keys' epsilon.
      state: after the last step.
    """

    gates: Gates
    erase: Float[Array, "B T HV"]
    state: MDNState


def record_layers(
    model: MDNForCausalLM,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    cache: ModelCache | None = None,
) -> tuple[dict[int, LayerRecord], ModelCache]:
    """Runs the model's blocks and keeps the gates and states of its MDN layers.

    Args:
      model: the model.
      tokens: as the model's.
      segment_ids: as the model's.
      cache: as the model's.

    Returns:
      The record of each layer of MDN or Titans by its index, and the cache.

    Raises:
      TypeError: a dtype or type that does not fit.
      ValueError: a shape, or a number of cache entries, that does not fit.
    """
    if cache is not None and len(cache) != len(model.layers):
        raise ValueError(
            f"cache: expected {len(model.layers)} entries (the layers), got {len(cache)}"
        )
    records, caches = {}, []
    h, unknown = model.embed(tokens)
    h = jnp.where(unknown[:, :, None], jnp.nan, h)
    before = cache or (None,) * len(model.layers)
    for index, (block, entering) in enumerate(zip(model.layers, before, strict=True)):
        mixer, x = block.mixer, block.mixer_norm(h)
        h, after = block(h, segment_ids, entering)
        caches.append(after)
        if isinstance(mixer, MomentumDeltaNet) and isinstance(after, MDNCache):
            gates = mixer.gates(x.astype(mixer.dtype))
            alpha = jnp.exp(gates.log_alpha)
            erase = alpha if mixer.erases_decayed else jnp.ones_like(alpha)
            records[index] = LayerRecord(gates, erase, full(after.state))
    return records, tuple(caches)


def state_norms(state: MDNState) -> tuple[Float[Array, "B HV"], Float[Array, "B HV"]]:
    """Frobenius norms of every head's memory and momentum."""
    s, m = (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1))) for x in state)
    return s, m
