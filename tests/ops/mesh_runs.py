"""The rules over eight devices and on one; prints how far the results are apart, as JSON."""

import json
import sys
from functools import partial

from tests.mesh_program import prepare

if __name__ == "__main__":
    prepare()

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mdn_jax import momentum_delta_rule
from mdn_jax.ops import (
    context,
    gated_delta_rule,
    gated_delta_rule_2,
)
from mdn_jax.testing import GATE_REGIMES, random_inputs, relative_errors

ROWS, LENGTH = 8, 40  # stretches of 5, 10 and 20 steps, of which chunks of 4 and 3 are no divisor


def documents():
    """Boundaries on seams, beside them, none, many; a document over several devices; 0, 1, 0."""
    starts = [[], [5], [20], [10, 20, 30], [3, 4, 5, 6, 21], [39], [9, 11], [1, 20, 21]]
    steps = jnp.arange(LENGTH)
    ids = [sum([steps >= start for start in row], jnp.zeros(LENGTH, jnp.int32)) for row in starts]
    return (jnp.stack(ids) % 2).astype(jnp.int32)


def momentum_inputs(**options):
    sizes = {"batch": ROWS, "length": LENGTH, "heads": 1, "key_dim": 4, "value_dim": 3}
    return random_inputs(
        seed=3, regime=tuple(GATE_REGIMES), dtype="float64", **sizes | {"value_heads": 2} | options
    )


def gated_inputs():
    x = momentum_inputs(explicit_p=True)
    x["initial_state"] = x["initial_state"].s
    for name in ("log_mu", "eta"):
        x.pop(name)
    return x


def all_of(rule, ids):
    """Outputs, final states, and the gradients of their sum of sines."""

    def loss(x):
        outputs = rule(**x, segment_ids=ids)
        return sum(jnp.sum(jnp.sin(1 + y)) for y in jax.tree.leaves(outputs)), outputs

    def run(x):
        (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(x)
        return {"outputs": outputs, "gradients": gradients}

    return run


def errors(actual, expected):
    return {
        name: max(relative_errors(jax.device_get(actual[name]), expected[name]).values())
        for name in expected
    }


def over_context(rule, mesh, ids, x, *, check_vma=True, **options):
    """`all_of` with tokens over `context` and rows over `data`."""
    mesh = jax.make_mesh(mesh, ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    tokens, states = PartitionSpec("data", "context"), PartitionSpec("data")
    specs = {name: states if name == "initial_state" else tokens for name in x}

    def sharded(*, segment_ids, **x):
        return jax.shard_map(
            lambda x, ids: rule(**x, segment_ids=ids, context_axis="context", **options),
            mesh=mesh,
            in_specs=(specs, tokens),
            out_specs=(tokens, states),
            check_vma=check_vma,
        )(x, segment_ids)

    return jax.jit(all_of(sharded, ids))


def context_cases():
    ids = documents()
    x = momentum_inputs()
    expected = jax.jit(all_of(partial(momentum_delta_rule, implementation="scan"), ids))(x)
    run = over_context(momentum_delta_rule, (1, 8), ids, x, implementation="xla", chunk_size=3)
    yield "momentum, xla, 1 x 8", errors(run(x), expected)
    # in the first documents, but for that of a single step: a chunk mixes what starts in it
    bad = x | {"v": x["v"].at[:-1, 0].set(jnp.nan)}
    first = jnp.cumsum(ids[:, 1:] != ids[:, :-1], axis=1) == 0
    first = jnp.pad(first, ((0, 0), (1, 0)), constant_values=True).at[-1].set(False)
    finite = jnp.isfinite(run(bad)["outputs"][0]).all((2, 3))
    seams = jnp.arange(LENGTH) // 5 * 5
    later = ~jnp.take_along_axis(first, seams[None].repeat(ROWS, 0), axis=1)
    yield "a nan stays in its document", {"steps": int((later & ~finite).sum())}
    yield "a nan goes on in it", {"steps": int((first & finite).sum())}

    context._WIDEST = 4  # two calls for the summary
    run = over_context(momentum_delta_rule, (4, 2), ids, x, implementation="scan")
    yield "momentum, scan, 4 x 2, in two calls", errors(run(x), expected)
    context._WIDEST = 512

    x = momentum_inputs(explicit_p=True, initial_state=False)
    options = {"implementation": "xla", "chunk_size": 4, "check_vma": False}
    run = over_context(momentum_delta_rule, (2, 4), None, x, **options)
    rule = partial(momentum_delta_rule, implementation="scan")
    yield "momentum, p, whole rows, 2 x 4", errors(run(x), jax.jit(all_of(rule, None))(x))

    x = gated_inputs()
    expected = jax.jit(all_of(partial(gated_delta_rule, implementation="scan"), ids))(x)
    run = over_context(gated_delta_rule, (2, 4), ids, x, implementation="scan")
    yield "gated delta rule, p, scan, 2 x 4", errors(run(x), expected)


def explicit_cases():
    mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(AxisType.Explicit,) * 3)

    def placed(tree, time):
        def place(path, y):
            state = "initial_state" in jax.tree_util.keystr(path)
            heads = "z" if y.ndim > 2 and y.shape[1 if state else 2] > 1 else None
            spec = PartitionSpec("x", heads) if state else PartitionSpec("x", time, heads)
            spec = spec if y.ndim > 2 else PartitionSpec("x", time)
            return jax.device_put(y, NamedSharding(mesh, spec))

        return jax.tree_util.tree_map_with_path(place, tree)

    ids = documents()
    shared = momentum_inputs()  # one key head of two value heads
    apart = momentum_inputs(heads=2)
    channels = {"b": apart["k"], "w": apart["v"], "log_alpha": apart["log_alpha"][..., None]}
    channels["log_alpha"] = channels["log_alpha"] * jnp.linspace(0.1, 2, 4)
    qkv = {name: apart[name] for name in "qkv"}
    for name, rule, x, time, implementation in (
        ("momentum, xla, tokens cut", momentum_delta_rule, shared, "y", "xla"),
        ("momentum, scan", momentum_delta_rule, apart, None, "scan"),
        ("gated delta rule 2, tokens gathered", gated_delta_rule_2, qkv | channels, "y", "scan"),
    ):
        rule = partial(rule, implementation=implementation)
        expected = jax.jit(all_of(rule, ids))(x)
        actual = jax.jit(all_of(rule, placed(ids, time)))(placed(x, time))
        found = errors(actual, expected)
        spec = jax.typeof(actual["outputs"][0]).sharding.spec
        cut = time if rule.func is momentum_delta_rule else None
        found["as cut"] = 0.0 if tuple(spec) == ("x", cut, "z", None) else repr(spec)
        yield f"Explicit: {name}", found


if __name__ == "__main__":
    results = dict(context_cases()) | dict(explicit_cases())
    json.dump(results, sys.stdout)
