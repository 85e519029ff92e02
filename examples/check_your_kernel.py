"""Checks an implementation of your own against the definition: every gate regime, every gradient.

    python examples/check_your_kernel.py

Put yours in the place of `mine`. It takes the arguments of `mdn_jax.momentum_delta_rule` and
returns what that returns. Errors are relative, in Frobenius norm; the definition is a float32 scan
with full-precision products. Half a minute to a minute and a half on a CPU, most of it compiling.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.testing import GATE_REGIMES, random_inputs, relative_errors

LIMIT = 1e-4


def mine(**inputs: Any) -> tuple[jax.Array, MDNState]:
    """Yours; here the chunkwise algorithm, so that the example runs anywhere."""
    return momentum_delta_rule(**inputs, implementation="xla")


def definition(**inputs: Any) -> tuple[jax.Array, MDNState]:
    """The recurrence, one step after the other."""
    with jax.default_matmul_precision("highest"):
        return momentum_delta_rule(**inputs, implementation="scan")


def outputs_and_gradients(rule: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """Outputs, final state and the gradient of every array, with random cotangents."""
    fixed = {"segment_ids": inputs["segment_ids"]}
    arrays = {name: x for name, x in inputs.items() if name not in fixed}

    @jax.jit
    def run(arrays: Any) -> tuple[Any, Any]:
        outputs, pull = jax.vjp(lambda arrays: rule(**arrays, **fixed), arrays)
        leaves, structure = jax.tree.flatten(outputs)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        cotangents = [jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
        return outputs, pull(jax.tree.unflatten(structure, cotangents))[0]

    return run(arrays)


def check(regime: str) -> float:
    """The largest error in one gate regime."""
    inputs = random_inputs(
        seed=0,
        length=150,  # which no chunk divides
        heads=2,
        value_heads=4,
        regime=regime,
        documents=3,
        dtype=jnp.float32,
    )
    actual, expected = (outputs_and_gradients(rule, inputs) for rule in (mine, definition))
    outputs, gradients = map(relative_errors, actual, expected)
    worst = max(gradients, key=gradients.__getitem__)
    print(
        f"{regime:18} outputs {max(outputs.values()):.1e}, "
        f"gradients {gradients[worst]:.1e} ({worst})"
    )
    return max(*outputs.values(), *gradients.values())


def main() -> None:
    """A line a regime; ends with an error if one is outside the limit."""
    outside = [regime for regime in GATE_REGIMES if not check(regime) <= LIMIT]
    if outside:
        raise SystemExit(f"outside {LIMIT:g}: {', '.join(outside)}")


if __name__ == "__main__":
    main()
