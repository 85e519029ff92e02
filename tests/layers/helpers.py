"""What the tests of layers, models and interop share."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mdn_jax import MDNConfig
from mdn_jax.interop import official_state_dict
from mdn_jax.models import AttentionConfig
from mdn_jax.testing import relative_error

GOLDEN = Path(__file__).parents[1] / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())

TINY = MDNConfig(
    vocab_size=31,
    hidden_size=32,
    num_hidden_layers=2,
    num_heads=2,
    head_dim=8,
    intermediate_size=32,
    initializer_range=0.2,  # so that every path matters
)
# an MLP sees one token at a time: without, where the others are what it is about
BARE = dataclasses.replace(TINY, intermediate_size=0)
TINY_ATTENTION = AttentionConfig(layers=(1,), num_heads=4, num_kv_heads=2, window_size=5)


def golden(name):
    """The arrays of a golden case, and its parameters by their published names."""
    data = dict(np.load(GOLDEN / f"{name}.npz"))
    return data, {k.removeprefix("param/"): x for k, x in data.items() if k.startswith("param/")}


def check_errors(errors, dtype, plain):
    """Holds golden errors to 2e-6 in float64, and in float32 to a plain float32 run's with room."""
    for name, error in errors.items():
        gradient = name.startswith(("grad/", "g_"))
        allowed = max(1e-4 if gradient else 2e-5, 3 * (plain.get(name) or 0.0))
        assert error <= (2e-6 if dtype == "float64" else allowed), (name, error)


def gradient_errors(module, gradients, data):
    """Relative error of the gradient of every parameter, by its published name."""
    ours = official_state_dict(nnx.merge(nnx.graphdef(module), gradients))
    names = {name.removeprefix("grad/") for name in data if name.startswith("grad/")}
    assert names == ours.keys() - ({"lm_head.weight"} - names)
    return {f"grad/{name}": relative_error(ours[name], data[f"grad/{name}"]) for name in names}


@nnx.jit
def call(module, x, segment_ids=None, cache=None):
    return module(x, segment_ids, cache)


@nnx.jit
def vjp(module, x, cotangent, segment_ids=None, cache=None):
    """Gradients of sum(y * cotangent) for the module, x and the cache."""

    def loss(module, x, cache):
        y, _ = module(x, segment_ids, cache)
        return (y * cotangent).sum()

    return nnx.grad(loss, argnums=(0, 1, 2))(module, x, cache)


def normal(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_close(actual, expected, tolerance=1e-5):
    """Every leaf, by relative error in Frobenius norm; integers exactly."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        if jnp.issubdtype(y.dtype, jnp.integer):
            np.testing.assert_array_equal(x, y)
        else:
            error = relative_error(x, y)
            assert error <= tolerance, (jax.tree_util.keystr(path), error)
