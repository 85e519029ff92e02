"""The rules with rows, tokens and heads over devices are the rules on one."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from mdn_jax import momentum_delta_rule
from mdn_jax.ops import gated_delta_rule
from mdn_jax.testing import random_inputs
from tests.mesh_program import report

CONTEXT = [
    "momentum, xla, 1 x 8",
    "momentum, scan, 4 x 2, in two calls",
    "momentum, p, whole rows, 2 x 4",
    "gated delta rule, p, scan, 2 x 4",
]
EXPLICIT = [
    "Explicit: momentum, xla, tokens cut",
    "Explicit: momentum, scan",
    "Explicit: gated delta rule 2, tokens gathered",
]


@pytest.fixture(scope="module")
def errors():
    return report("tests.ops.mesh_runs")


@pytest.mark.slow
@pytest.mark.parametrize("case", CONTEXT + EXPLICIT)
def test_many_devices_give_what_one_does(errors, case):
    assert errors[case]["outputs"] <= 1e-10
    assert errors[case]["gradients"] <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPLICIT)
def test_results_are_cut_as_the_inputs_are(errors, case):
    assert errors[case]["as cut"] == 0


@pytest.mark.slow
def test_what_is_not_finite_stays_in_its_document(errors):
    assert errors["a nan stays in its document"]["steps"] == 0
    assert errors["a nan goes on in it"]["steps"] == 0


INPUTS = {"batch": 1, "length": 4, "heads": 1, "key_dim": 2, "value_dim": 2}


@pytest.mark.parametrize("axis", ["tokens", 3])
def test_an_axis_that_is_not_there(axis):
    x = random_inputs(seed=0, initial_state=False, **INPUTS)
    with pytest.raises(ValueError, match=r"context_axis: expected None or the name of a mesh axis"):
        momentum_delta_rule(**x, context_axis=axis)
    del x["log_mu"], x["eta"]
    with pytest.raises(ValueError, match=rf"context_axis: .* surrounding .*, got {axis!r}"):
        gated_delta_rule(**x, context_axis=axis)


def test_forward_mode_is_not_for_stretches():
    x = random_inputs(seed=0, initial_state=False, **INPUTS)
    mesh = jax.make_mesh((1,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    tokens = PartitionSpec(None, "context")

    def outputs(v):
        rule = jax.shard_map(
            lambda x: momentum_delta_rule(**x, context_axis="context", implementation="scan")[0],
            mesh=mesh,
            in_specs=(tokens,),
            out_specs=tokens,
        )
        return rule(x | {"v": v})

    expected = jax.jit(momentum_delta_rule)(**x)[0]
    actual, derivative = jax.jit(lambda v: jax.jvp(outputs, (v,), (v,)))(x["v"])
    assert jnp.allclose(actual, expected, atol=1e-6)  # an axis of one device
    assert jnp.isfinite(derivative).all()
