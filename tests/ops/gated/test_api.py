"""Which implementation a call of a gated rule takes, and what is said of a bad one."""

import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from mdn_jax.ops import api, gated_delta_rule
from mdn_jax.ops.gated import mosaic
from mdn_jax.testing import relative_errors
from tests.ops.gated.helpers import RULES, random_call

KINDS = {"gdn": "gated_deltanet", "kda": "kda", "mamba2": "simple_gla"}


@pytest.fixture
def library(monkeypatch):
    """jax-linear-attention as it is called, computing with the scan; a list of its calls."""
    calls = []

    def linear_attention(kind, q, k, v, *, impl, use_qk_l2norm=None, **inputs):
        calls.append((kind, impl, inputs["scale"], use_qk_l2norm))
        rule = next(name for name, theirs in KINDS.items() if theirs == kind)
        beta = inputs.get("beta", jnp.ones(v.shape[:3], jnp.float32))
        options = {} if use_qk_l2norm is None else {"normalize_qk": use_qk_l2norm}
        assert inputs["output_final_state"] is True
        assert (jnp.diff(inputs["segment_ids"], axis=1) >= 0).all()
        return RULES[rule](
            q,
            k,
            v,
            inputs["g"],
            beta,
            initial_state=inputs["initial_state"],
            segment_ids=inputs["segment_ids"],
            scale=inputs["scale"],
            implementation="scan",
            **options,
        )

    names = {theirs.supports.partition(":")[0] for theirs in mosaic._KINDS.values()}
    modules = {name: types.ModuleType(name) for name in ("jla", "jla.ops", *names)}
    modules["jla"].__spec__ = importlib.util.spec_from_loader("jla", None)
    modules["jla.ops"].linear_attention = linear_attention
    for theirs in mosaic._KINDS.values():
        module, _, name = theirs.supports.partition(":")
        fits = lambda q, k, v, *gates, **options: q.shape[-1] == 12  # noqa: E731
        setattr(modules[module], name, fits)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(api, "_capability", lambda: (9, 0))
    return calls


@pytest.mark.parametrize("rule", KINDS)
def test_the_kernels_of_the_library_are_called_as_theirs(rule, library):
    inputs = random_call(rule, length=20, dtype="float32", documents=3)
    inputs["segment_ids"] %= 2  # the first id comes back
    expected = RULES[rule](**inputs, implementation="scan")
    assert not library
    actual = RULES[rule](**inputs)
    assert library == [
        (KINDS[rule], "mosaic_gpu", 12**-0.5, None if rule == "mamba2" else True),
    ]
    assert max(relative_errors(actual, expected).values()) <= 1e-6


def test_calls_that_the_library_does_not_take(library, monkeypatch):
    def lacking(name, **changes):
        with pytest.raises(ValueError, match='implementation: "mosaic_gpu" expects') as raised:
            RULES[name](**inputs | changes, implementation="mosaic_gpu")
        return str(raised.value)

    inputs = random_call("comba", length=20, dtype="float32")
    assert "p = None" in lacking("comba")
    inputs = random_call("kda", length=20, dtype="float32")
    assert "chunk_size 64 or None, got 32" in lacking("kda", chunk_size=32)
    inputs = random_call("kda", length=20, dtype="float32", key_dim=10)
    assert "supports (dtype, K, V)" in lacking("kda")
    monkeypatch.setattr(api, "_capability", lambda: (8, 0))
    assert "a Hopper GPU" in lacking("kda")
    monkeypatch.setattr(api, "_capability", lambda: (9, 0))
    with jax.default_matmul_precision("highest"):
        assert 'default_matmul_precision below "highest"' in lacking("kda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "extra 'mosaic'" in lacking("kda")
    RULES["kda"](**inputs)  # by another implementation
    assert not library


def test_the_library_itself():
    """Its definition, called as its kernels are, computes what the scans here do."""
    pytest.importorskip("jla")
    for rule, kind in KINDS.items():
        inputs = random_call(rule, length=70, dtype="float32", documents=3)
        expected = RULES[rule](**inputs, implementation="scan")
        names = ("q", "k", "v", "log_alpha", "beta", "initial_state", "segment_ids")
        call = mosaic.Call(*(inputs[name] for name in names))
        kinds = {"gdn": "gated_delta", "kda": "kimi_delta", "mamba2": "gated_linear"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mosaic, "_IMPLEMENTATION", "reference")
            actual = mosaic.run(kinds[rule], call, scale=12**-0.5, normalize=True)
        assert max(relative_errors(actual, expected).values()) <= 1e-5, kind


def test_the_definition_of_the_library_for_gates_of_each_channel():
    ops = pytest.importorskip("jla.ops")
    inputs = random_call("gdn2", length=70, dtype="float32", documents=3)
    expected = RULES["gdn2"](**inputs, implementation="scan")
    theirs = inputs | {"g": inputs.pop("log_alpha")}
    theirs = {name: x for name, x in theirs.items() if name != "log_alpha"}
    options = {"impl": "reference", "use_qk_l2norm": True, "output_final_state": True}
    actual = ops.linear_attention("gdn2", **theirs, **options)
    assert max(relative_errors(actual, expected).values()) <= 1e-5


def test_the_kernels_of_the_momentum_delta_rule(monkeypatch):
    """On a GPU the delta rules with a decay of each head are momentum delta rules without any."""
    monkeypatch.setattr(api, "_capability", lambda: (8, 0))
    seen = []

    def rule(*arrays, **options):
        seen.append(options.pop("implementation"))
        return api.momentum_delta_rule(*arrays, implementation="scan", **options)

    monkeypatch.setattr("mdn_jax.ops.gated.api.momentum_delta_rule", rule)
    for name in ("gdn", "comba"):
        inputs = random_call(name, length=20, dtype="float32", value_heads=4, documents=2)
        expected = RULES[name](**inputs, implementation="scan")
        actual = RULES[name](**inputs)
        assert max(relative_errors(actual, expected).values()) <= 1e-6
    assert seen == ["pallas_triton"] * 2
    with pytest.raises(ValueError, match="expects the gated delta rule with a decay of each head"):
        RULES["kda"](
            **random_call("kda", length=3, dtype="float32"), implementation="pallas_triton"
        )


GOOD = random_call("gdn", length=5, dtype="float32")
GATES = random_call("gdn2", length=5, dtype="float32")


@pytest.mark.parametrize(
    ("rule", "changes", "error", "words"),
    [
        ("gdn", {"q": GOOD["q"][0]}, ValueError, ["q", "rank 4", "[5, 2, 12]"]),
        ("gdn", {"k": GOOD["k"][..., :3]}, ValueError, ["k", "as q", "[2, 5, 2, 3]"]),
        ("gdn", {"v": jnp.zeros((2, 5, 3, 8))}, ValueError, ["v", "multiple of H = 2", "HV = 3"]),
        ("gdn", {"log_alpha": jnp.zeros((2, 5, 2, 12))}, ValueError, ["log_alpha", "[B, T, HV]"]),
        ("kda", {}, ValueError, ["log_alpha", "[B, T, HV, K] = [2, 5, 2, 12]", "[2, 5, 2]"]),
        ("mamba2", {"beta": jnp.zeros((2, 5, 2), int)}, TypeError, ["beta", "int32"]),
        ("gdn2", {"b": GATES["w"]}, ValueError, ["b", "[B, T, HV, K] = [2, 5, 2, 12]", "2, 8]"]),
        ("gdn2", {"w": GATES["b"]}, ValueError, ["w", "[B, T, HV, V] = [2, 5, 2, 8]", "2, 12]"]),
        ("gdn2", {"implementation": "mosaic_gpu"}, ValueError, ["implementation", "scan, xla"]),
        ("gdn", {"p": jnp.zeros((2, 5, 3, 12))}, ValueError, ["p", "H or HV", "[2, 5, 3, 12]"]),
        ("gdn", {"initial_state": (1, 2)}, TypeError, ["initial_state", "array", "tuple"]),
        ("gdn", {"segment_ids": jnp.zeros((2, 4), int)}, ValueError, ["segment_ids", "[2, 5]"]),
        ("gdn", {"implementation": "triton"}, ValueError, ["implementation", "scan", "'triton'"]),
        ("gdn", {"chunk_size": 0}, ValueError, ["chunk_size", ">= 1", "0"]),
        ("gdn", {"scale": float("nan")}, ValueError, ["scale", "finite", "nan"]),
    ],
)
def test_bad_input(rule, changes, error, words):
    with pytest.raises(error) as raised:
        RULES[rule](**(GATES if rule == "gdn2" else GOOD) | changes)
    for word in words:
        assert word in str(raised.value), str(raised.value)


def test_without_an_initial_state_inside_shard_map():
    inputs = {n: x for n, x in GOOD.items() if n != "initial_state"}
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("data", None, "tensor")

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(gated_delta_rule(**x, implementation="xla")[0] ** 2))(x)

    sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=spec, out_specs=spec))
    assert max(relative_errors(sharded(inputs), jax.jit(gradient)(inputs)).values()) <= 1e-5
