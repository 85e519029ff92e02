"""The day on which JAX drops the Triton backend of Pallas, simulated."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import warnings
from functools import partial
from importlib.machinery import ModuleSpec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mdn_jax import (
    MDNConfig,
    MDNForCausalLM,
    MomentumDeltaNet,
    generate,
    momentum_delta_rule,
)
from mdn_jax.ops import MissingBackendWarning, api, fallback, gated_delta_rule, kernels
from mdn_jax.testing import random_inputs, relative_errors
from pallas_kernels import backends

MODULE = "jax.experimental.pallas.triton"
INPUTS = random_inputs(
    seed=0, batch=1, length=20, heads=1, value_heads=2, key_dim=16, value_dim=16, documents=2
)
# The default of filterwarnings in this project is an error.
quietly = pytest.mark.filterwarnings("ignore::mdn_jax.ops.MissingBackendWarning")


@pytest.fixture
def gone(monkeypatch):
    """A GPU of compute capability 9.0, and a JAX without the backend."""
    monkeypatch.setattr(api, "_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, MODULE, None)
    monkeypatch.setattr(fallback, "_warned", False)


def test_it_is_there_today():
    assert backends.triton_lacks() is None
    parameters = backends.triton_parameters(warps=2, stages=3)
    assert (parameters.num_warps, parameters.num_stages) == (2, 3)


def test_it_is_gone(gone):
    expected = f"0.11 and 0.12 have it.*, got jax {jax.__version__} without it"
    with pytest.raises(ValueError, match=f"jax: the kernels expect a JAX whose .*{expected}"):
        backends.triton_parameters(warps=2, stages=3)


def test_a_module_without_its_parameters_is_gone_too(monkeypatch):
    monkeypatch.delattr(f"{MODULE}.CompilerParams")
    assert backends.triton_lacks() == backends.WITHOUT_TRITON


@pytest.mark.parametrize("length", [20, 2])  # chunks, and the decode kernel's steps
def test_none_falls_back_and_warns_once(gone, length):
    inputs = INPUTS if length == 20 else random_inputs(seed=1, length=length)
    match = r"Triton backend.*without it; .*xla"
    with pytest.warns(MissingBackendWarning, match=match) as caught:
        chosen = momentum_delta_rule(**inputs)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        momentum_delta_rule(**inputs)
        gated_delta_rule(*(inputs[x] for x in ("q", "k", "v", "log_alpha", "beta")))
    expected = momentum_delta_rule(**inputs, implementation="xla")
    jax.tree.map(np.testing.assert_array_equal, chosen, expected)


def test_the_gated_rule_warns_too(gone):
    with pytest.warns(MissingBackendWarning) as caught:
        gated_delta_rule(*(INPUTS[x] for x in ("q", "k", "v", "log_alpha", "beta")))
    assert [warning.filename for warning in caught] == [__file__]  # where the rule was called


@pytest.mark.parametrize("rule", [momentum_delta_rule, gated_delta_rule])
def test_the_named_implementation_says_why(gone, rule):
    names = ("q", "k", "v", "log_alpha", "beta")
    inputs = INPUTS if rule is momentum_delta_rule else {name: INPUTS[name] for name in names}
    expected = (
        'implementation: "pallas_triton" expects a JAX whose Pallas has the Triton backend .*'
        'got jax .* without it; use implementation="xla"'
    )
    with pytest.raises(ValueError, match=expected):
        rule(**inputs, implementation="pallas_triton")


def test_what_the_kernels_never_ran_is_no_reason_to_warn(gone, monkeypatch):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        momentum_delta_rule(**random_inputs(seed=1, length=2, key_dim=257))
        momentum_delta_rule(**INPUTS, chunk_size=16)
        monkeypatch.setattr(api, "_capability", lambda: None)
        momentum_delta_rule(**INPUTS)
    assert [x for x in caught if x.category is MissingBackendWarning] == []


@quietly
def test_layers_train_and_models_decode_on_what_is_left(gone):
    config = MDNConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_heads=2, head_dim=16)
    x = jnp.ones((1, 20, 32))

    def gradient(implementation):
        layer = MomentumDeltaNet(config, implementation=implementation, rngs=nnx.Rngs(0))
        graph, params = nnx.split(layer)
        loss = jax.grad(lambda params: nnx.merge(graph, params)(x)[0].sum())
        return jax.eval_shape(loss, params)

    assert jax.tree.leaves(gradient(None))
    with pytest.raises(ValueError, match=r"got jax .* without it"):
        gradient("pallas_triton")
    model = MDNForCausalLM(config, rngs=nnx.Rngs(0))
    assert len(generate(model, [[1, 2]], max_new_tokens=2).tokens[0]) == 2
    model = MDNForCausalLM(config, implementation="pallas_triton", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"got jax .* without it"):
        generate(model, [[1, 2]], max_new_tokens=2)


def test_the_interpreter_needs_no_backend(gone):
    """So that the kernels can be developed and ported."""
    inputs = random_inputs(seed=1, batch=1, heads=1, length=2, key_dim=16, value_dim=16)
    expected = momentum_delta_rule(**inputs, implementation="scan")
    actual = partial(kernels.kernel_rule, interpret=True)(**inputs)
    assert max(relative_errors(actual, expected).values()) <= 1e-6


def test_a_kernel_that_is_lowered_without_it_says_so(gone):
    """What `implementation="triton"` meets in a gradient: the chunk kernels."""
    rule = jax.jit(kernels.kernel_rule)
    with pytest.raises(ValueError, match="jax: the kernels expect a JAX whose Pallas"):
        rule.lower(**INPUTS)


def test_the_kernels_can_be_imported_without_it():
    code = (
        f"import sys; sys.modules[{MODULE!r}] = None; "
        "import mdn_jax.ops.kernels, pallas_kernels.momentum_delta.decode; "
        "from pallas_kernels.backends import triton_lacks; print(triton_lacks())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == backends.WITHOUT_TRITON


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (None, "is not installed"),
        ("0.4.1", r"below 0\.4 .*, got 0\.4\.1"),
        ("0.10.0", "below 0"),
        ("0.3.1", None),
    ],
)
def test_which_jax_triton_fits(monkeypatch, version, words):
    found = None if version is None else ModuleSpec("jax_triton", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: found)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    if words is None:
        assert backends.jax_triton_lacks() is None
        return
    monkeypatch.setattr(api, "_capability", lambda: (9, 0))
    inputs = random_inputs(seed=1, length=2)
    with pytest.raises(ValueError, match=f'implementation: "triton" expects jax-triton.*{words}'):
        momentum_delta_rule(**inputs, implementation="triton")
