"""The kernels on stretches of rows over simulated devices; prints errors against the scan as JSON.

python -m tests.kernels.stretch_runs
"""

import json
import sys
from functools import partial

from tests.mesh_program import prepare

if __name__ == "__main__":
    prepare()

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from mdn_jax import momentum_delta_rule
from mdn_jax.ops.context import over_context
from mdn_jax.testing import (
    GATE_REGIMES,
    outputs_and_gradients,
    random_cotangents,
    random_inputs,
    relative_errors,
)
from tests.kernels.helpers import interpreted_rule

DEVICES = 4
LENGTH = 400  # stretches of 100 or 200 steps: two and four chunks, the last one not full


def documents():
    """A row a regime: starts on seams and pieces, beside them, none, a document of several."""
    starts = [[], [100], [99, 101, 300], [64, 164, 264], [1, 2, 250], [200, 399], [136]]
    steps = jnp.arange(LENGTH)
    rows = [starts[i % len(starts)] for i in range(len(GATE_REGIMES))]
    return jnp.stack(
        [sum((steps >= at).astype(jnp.int32) for at in row) + 0 * steps for row in rows]
    )


def inputs(**options):
    x = random_inputs(
        seed=5,
        batch=len(GATE_REGIMES),
        length=LENGTH,
        heads=1,
        value_heads=2,
        key_dim=16,
        value_dim=32,
        regime=tuple(GATE_REGIMES),
        **options,
    )
    return x | {"segment_ids": documents()}


def over(count, pieces):
    """The rule on the kernels with the tokens of rows over so many devices."""
    mesh = jax.make_mesh((count,), ("context",), (AxisType.Auto,), devices=jax.devices()[:count])
    tokens, whole = PartitionSpec(None, "context"), PartitionSpec()
    kernels = partial(interpreted_rule, pieces=pieces)

    def rule(*, initial_state, segment_ids, **arrays):
        return jax.shard_map(
            lambda arrays, state, ids: over_context(
                kernels,
                "context",
                arrays,
                initial_state=state,
                segment_ids=ids,
                exchanging=kernels,
            ),
            mesh=mesh,
            in_specs=(tokens, whole, tokens),
            out_specs=(tokens, whole),
            check_vma=False,
        )(arrays, initial_state, segment_ids)

    return jax.jit(outputs_and_gradients(rule))


def main():
    scan = jax.jit(outputs_and_gradients(partial(momentum_delta_rule, implementation="scan")))
    results = {}
    for name, count, pieces, dtype in (("2 x 4", 2, 4, "float32"), ("4 x 1", 4, 1, "float32")):
        x = inputs(dtype=dtype)
        cotangent = random_cotangents(x)
        run = over(count, pieces)
        actual, expected = (jax.device_get(f(x, cotangent)) for f in (run, scan))
        results[name] = {k: float(v) for k, v in relative_errors(actual, expected).items()}
        if count == 2:
            # a value of one document; documents that start in the same chunk are mixed with it
            bad = x | {"v": x["v"].at[:, 3].set(jnp.nan)}
            (o, state), _ = run(bad, cotangent)
            own = x["segment_ids"] == x["segment_ids"][:, 3:4]
            finite = jnp.isfinite(o).all((2, 3))
            results["nan"] = {
                "in others": int((~finite & ~own)[:, 64:].sum()),
                "in the states of others": int(
                    sum((~jnp.isfinite(y[~own[:, -1]])).sum() for y in state)
                ),
                "not where it is": int(finite[:, 3].sum()),
            }
    return results


if __name__ == "__main__":
    json.dump(main(), sys.stdout)
