"""Models over eight devices and on one; prints how far the results are apart, as JSON."""

import json
import sys

from tests.mesh_program import prepare

if __name__ == "__main__":
    prepare()

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.layers.sharding import mesh_axes
from mdn_jax.models import prefill, prefill_over, stream
from mdn_jax.models.loss import summed_loss
from mdn_jax.testing import relative_errors
from tests.tiny import TINY_MODEL

ROWS, LENGTH, BEFORE = 2, 16, 5
HYBRID = {
    "vocab_size": 31,
    "num_hidden_layers": 2,
    "intermediate_size": 0,
    "num_heads": 2,
    "head_dim": 4,
    "use_output_correction": True,
    "other_mixer": "attention",
    "other_layers": (1,),
}


def model(context_axis=None):
    """The parts of a hybrid of two layers."""
    return nnx.split(
        MDNForCausalLM(
            MDNConfig(**TINY_MODEL | HYBRID),
            implementation="scan",
            dtype=jnp.float64,
            param_dtype=jnp.float64,
            context_axis=context_axis,
            rngs=nnx.Rngs(0),
        )
    )


def run(graph, params, tokens, ids, cache):
    """The loss, and what a row leaves to the next tokens."""
    made = nnx.merge(graph, params)
    h, after = made.hidden(tokens, ids, cache)
    return summed_loss(h, made.output_kernel(), (tokens + 1) % 31), (h, after)


def both(graph):
    return jax.jit(jax.value_and_grad(lambda *inputs: run(graph, *inputs), has_aux=True))


def found(actual, expected):
    (loss, (h, cache)), gradients = jax.device_get(actual)
    (loss_1, (h_1, cache_1)), gradients_1 = jax.device_get(expected)
    outputs = relative_errors((loss, h, cache), (loss_1, h_1, cache_1))
    return {
        "outputs": max(outputs.values()),
        "gradients": max(relative_errors(gradients, gradients_1).values()),
    }


def cases():
    tokens = jax.random.randint(jax.random.key(0), (ROWS, LENGTH), 0, 31)
    ids = jnp.stack([jnp.arange(LENGTH) // 3, (jnp.arange(LENGTH) >= 8).astype(int)])
    ids = ids.astype(jnp.int32)
    graph, params = model()
    _, (_, cache) = jax.jit(lambda p, x: run(graph, p, x, None, None))(params, tokens[:, :BEFORE])
    alone = both(graph)
    expected = alone(params, tokens, ids, cache)

    mesh = jax.make_mesh((2, 4), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    stretches, rows, whole = (
        PartitionSpec("data", "context"),
        PartitionSpec("data"),
        PartitionSpec(),
    )
    stretch, _ = model("context")

    def inside(params, tokens, ids, cache):
        """Gradients inside: what is the same everywhere has the sum of all devices' gradients."""

        def loss(params):
            value, others = run(stretch, params, tokens, ids, cache)
            return jax.lax.psum(value, ("data", "context")), others

        return jax.value_and_grad(loss, has_aux=True)(params)

    sharded = jax.jit(
        jax.shard_map(
            inside,
            mesh=mesh,
            in_specs=(whole, stretches, stretches, rows),
            out_specs=((whole, (stretches, rows)), whole),
        )
    )
    yield "inside shard_map", found(sharded(params, tokens, ids, cache), expected)
    unknown = tokens.at[1, 5].set(99)  # nan to the end of its document, on the next device
    (_, (h, _)), _ = sharded(params, unknown, ids, cache)
    yield "unknown token", {"nan": jnp.isnan(h).all(2).astype(int).tolist()}

    explicit = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(AxisType.Explicit,) * 3)

    def cut(tree, spec):
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(explicit, spec)), tree)

    def heads(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        columns = any(f"{part}_proj.kernel" in name for part in "qkvg")
        return cut(x, PartitionSpec(None, "z") if columns else PartitionSpec())

    arrays = [cut(x, PartitionSpec("x", "y")) for x in (tokens, ids)]
    arrays.append(cut(cache, PartitionSpec("x")))
    actual = both(graph)(jax.tree_util.tree_map_with_path(heads, params), *arrays)
    yield "Explicit", found(actual, expected)
    h = actual[0][1][0]
    yield "Explicit, cut as", {"tokens": list(jax.typeof(h).sharding.spec)}
    automatic = jax.make_mesh((2, 4), ("rows", "long"), axis_types=(AxisType.Auto,) * 2)
    tokens, ids = (
        jax.device_put(x, NamedSharding(automatic, PartitionSpec("rows", "long")))
        for x in (tokens, ids)
    )
    with jax.set_mesh(automatic), mesh_axes(rows=("rows",), context=("long",), heads=()):
        yield "Auto", found(both(graph)(params, tokens, ids, cache), expected)

    yield "a prompt read by many", prompts()


def prompts():
    """Of two lengths, neither of which divides; what one device has, and what it makes of it."""
    alone = nnx.merge(*model())
    rows = [[int(x) for x in np.random.default_rng(i).integers(31, size=19 + i)] for i in range(2)]
    mesh = jax.make_mesh((2, 4), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    actual, expected = prefill_over(mesh, alone, rows), prefill(alone, rows)
    # without keys and values: here there is room for more
    compared = (jax.device_get(x._replace(cache=x.cache[0])) for x in (actual, expected))
    errors = relative_errors(*compared)
    pieces = [
        [piece.tokens for piece in stream(alone, state, max_new_tokens=4)]
        for state in (actual, expected)
    ]
    return {"state": max(errors.values()), "tokens": pieces}


if __name__ == "__main__":
    json.dump(dict(cases()), sys.stdout)
