"""Norms, SwiGLU and the loss on kernels along rows: what XLA's code gives, gradients too."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import MDNConfig, MDNForCausalLM
from mdn_jax.layers.mlp import SwiGLU
from mdn_jax.layers.norm import RMSNorm
from mdn_jax.models.loss import summed_loss
from mdn_jax.ops import api
from mdn_jax.ops.rowwise import MIN_STEPS
from mdn_jax.testing import relative_errors
from pallas_kernels import rowwise
from pallas_kernels.target import target_gpu
from tests.tiny import TINY_MODEL

KERNELS = ("rms_norm_bwd", "swiglu_bwd")


@pytest.fixture
def interpreted(monkeypatch):
    """Called: from there on a GPU is there, and its kernels run in the interpreter."""
    capability = []
    monkeypatch.setattr(api, "_capability", lambda: capability[0] if capability else None)
    for name in ("Norm", "swiglu_bwd", "cross_entropy_fwd"):
        monkeypatch.setattr(rowwise, name, partial(getattr(rowwise, name), interpret=True))
    return lambda: capability.append((9, 0))


def layers():
    options = {"rngs": nnx.Rngs(0), "dtype": jnp.float32}
    norm = RMSNorm(12, eps=1e-3, gate_activation="silu", **options)
    down = nnx.Linear(24, 6, use_bias=False, **options)
    return nnx.List([RMSNorm(24, eps=1e-3, **options), norm, SwiGLU(24, 20, **options), down])


def pieces(graph, params, x):
    """A residual block, then gated norms of heads, one with a projection."""
    plain, gated, mlp, down = nnx.merge(graph, params)
    normed, x = plain.with_input(x)
    x = x + mlp(normed)
    heads = x.reshape(*x.shape[:2], 2, -1)
    return gated(heads, jnp.cos(heads)), gated.down(heads, jnp.cos(heads), down), x


def both_passes(graph, params, x):
    y, pull = jax.vjp(partial(pieces, graph), params, x)
    return y, pull(jax.tree.map(jnp.sin, y))


def test_layers_on_the_kernels(interpreted):
    graph, params = nnx.split(layers())
    x = jax.random.normal(jax.random.key(0), (2, MIN_STEPS, 24))
    params = jax.tree.map(lambda a: 10 * a, params)
    expected = jax.jit(partial(both_passes, graph))(params, x)
    interpreted()
    run = jax.jit(lambda *given: both_passes(graph, *given)).trace(params, x)
    text = str(run.jaxpr)
    assert [text.count(f"name={name}") for name in KERNELS] == [3, 1]
    errors = relative_errors(run.lower().compile()(params, x), expected)
    assert max(errors.values()) <= 3e-6, errors


def test_the_loss_on_the_kernel(interpreted):
    h = jax.random.normal(jax.random.key(0), (2, 2 * MIN_STEPS, 8))
    kernel = jax.random.normal(jax.random.key(1), (8, 50))
    targets = jnp.asarray(np.random.default_rng(0).integers(50, size=(2, 2 * MIN_STEPS)))
    targets = targets.at[0, 3].set(-100)
    expected = jax.jit(jax.value_and_grad(summed_loss, (0, 1)))(h, kernel, targets)
    interpreted()
    run = jax.jit(jax.value_and_grad(lambda *given: summed_loss(*given, targets), (0, 1)))
    traced = run.trace(h, kernel)
    assert str(traced.jaxpr).count("name=cross_entropy_fwd") == 1
    errors = relative_errors(traced.lower().compile()(h, kernel), expected)
    assert max(errors.values()) <= 3e-6, errors


@pytest.mark.parametrize(
    ("axes", "rows", "calls"), [({"data": 2}, 64, 4), ({"data": 2, "tensor": 2}, 32, 3)]
)
def test_on_a_mesh_each_device_has_its_rows(axes, rows, calls):
    """As they lower; where heads are cut over devices, the products of the MLP are apart, and
    the residual stream's tokens are cut, too."""
    graph, params = nnx.split(layers())
    x = jax.ShapeDtypeStruct((4, 32, 24), jnp.float32)
    with target_gpu((9, 0), axes):
        traced = jax.jit(lambda *given: both_passes(graph, *given)).trace(params, x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    found = [line for line in text.splitlines() if "triton" in line]
    assert len(found) == calls
    assert all(f"tensor<{rows}x" in call or f"tensor<{2 * rows}x" in call for call in found)


def test_without_kernels_there_are_second_derivatives(interpreted):
    """Of a model on "xla" or "scan", whatever the device."""
    interpreted()
    config = MDNConfig(**TINY_MODEL)
    model = MDNForCausalLM(config, implementation="xla", rngs=nnx.Rngs(0))
    tokens = jnp.zeros((1, MIN_STEPS), jnp.int32)

    def along(t):
        h = jax.jvp(lambda t: model.norm(t * model.embeddings[...][tokens]), (t,), (t,))[1]
        return jnp.sum(model.layers[0](h)[0])

    jaxpr = jax.make_jaxpr(lambda t: jax.jvp(jax.grad(along), (t,), (t,)))(jnp.ones(()))
    assert "pallas_call" not in str(jaxpr)


def test_steps_of_decoding_are_left_to_xla(interpreted):
    graph, params = nnx.split(layers())
    interpreted()
    x = jnp.zeros((2, MIN_STEPS - 1, 24))
    assert "pallas_call" not in str(jax.make_jaxpr(partial(both_passes, graph))(params, x))
