"""Momentum DeltaNet in JAX."""

from typing import TYPE_CHECKING

from mdn_jax._version import __version__

if TYPE_CHECKING:
    from mdn_jax.layers import MomentumDeltaNet
    from mdn_jax.models import MDNConfig, MDNForCausalLM, Sampling, generate
    from mdn_jax.ops import MDNState, momentum_delta_rule
    from mdn_jax.saved.load import load
else:
    _HOMES = {
        "MDNConfig": "mdn_jax.models",
        "MDNForCausalLM": "mdn_jax.models",
        "MDNState": "mdn_jax.ops",
        "MomentumDeltaNet": "mdn_jax.layers",
        "Sampling": "mdn_jax.models",
        "generate": "mdn_jax.models",
        "load": "mdn_jax.saved.load",
        "momentum_delta_rule": "mdn_jax.ops",
    }
    _PARTS = {"layers", "models", "ops"}

    def __getattr__(name: str) -> object:
        """Imports a name at its first use: until jax is there, a command answers Ctrl-C itself."""
        import importlib

        if name in _PARTS:
            return importlib.import_module(f"mdn_jax.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module 'mdn_jax' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES, *_PARTS})


__all__ = [
    "MDNConfig",
    "MDNForCausalLM",
    "MDNState",
    "MomentumDeltaNet",
    "Sampling",
    "__version__",
    "generate",
    "load",
    "momentum_delta_rule",
]
