"""jit, vmap, grad, checkpoint, shard_map and memory."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.ops import TRITON_CALL, target_gpu
from mdn_jax.testing import random_inputs, relative_error, relative_errors

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["scan", "xla"])


@IMPLEMENTATIONS
def test_jit_equals_eager(implementation):
    inputs = random_inputs(seed=0)
    rule = partial(momentum_delta_rule, implementation=implementation)
    eager, compiled = rule(**inputs), jax.jit(rule)(**inputs)
    assert max(relative_errors(compiled, eager).values()) <= 1e-6


@IMPLEMENTATIONS
def test_vmap_equals_a_loop(implementation):
    stack = [random_inputs(seed=seed, length=20, documents=2) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *stack)
    rule = partial(momentum_delta_rule, implementation=implementation)
    mapped = jax.jit(jax.vmap(lambda x: rule(**x)))(stacked)
    run = jax.jit(rule)
    looped = jax.tree.map(lambda *x: jnp.stack(x), *(run(**x) for x in stack))
    assert max(relative_errors(mapped, looped).values()) <= 1e-6


@IMPLEMENTATIONS
def test_checkpoint_equals_plain_gradient(implementation):
    inputs = random_inputs(seed=1, length=40)

    def loss(v, wrap):
        rule = wrap(
            lambda v: momentum_delta_rule(**(inputs | {"v": v}), implementation=implementation)
        )
        return jnp.sum(rule(v)[0] ** 2)

    plain = jax.jit(jax.grad(lambda v: loss(v, lambda f: f)))(inputs["v"])
    kept = jax.jit(jax.grad(lambda v: loss(v, jax.checkpoint)))(inputs["v"])
    np.testing.assert_allclose(kept, plain, rtol=1e-5, atol=1e-7)


@IMPLEMENTATIONS
def test_shard_map_over_batch_and_heads(implementation):
    inputs = random_inputs(seed=2, length=20)
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    per_step = PartitionSpec("data", None, "tensor")
    per_state = PartitionSpec("data", "tensor")
    specs = dict.fromkeys(inputs, per_step) | {"initial_state": MDNState(per_state, per_state)}
    run = partial(momentum_delta_rule, implementation=implementation)
    rule = jax.shard_map(
        lambda x: run(**x),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(per_step, MDNState(per_state, per_state)),
    )
    actual, expected = jax.jit(rule)(inputs), jax.jit(run)(**inputs)
    assert max(relative_errors(actual, expected).values()) <= 1e-6


@IMPLEMENTATIONS
def test_gradient_inside_shard_map(implementation):
    """Also without an initial state, whose zeros are the same on every device."""
    inputs = random_inputs(seed=2, length=20, initial_state=False)
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    per_step = PartitionSpec("data", None, "tensor")

    def gradient(x):
        rule = partial(momentum_delta_rule, implementation=implementation)
        return jax.grad(lambda x: jnp.sum(rule(**x)[0] ** 2))(x)

    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(per_step,), out_specs=per_step)
    actual, expected = jax.jit(sharded)(inputs), jax.jit(gradient)(inputs)
    assert max(relative_errors(actual, expected).values()) <= 1e-5


def test_vmap_of_gradients_equals_a_loop():
    stack = [random_inputs(seed=seed, length=20) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *stack)

    @jax.jit
    def gradient(x):
        return jax.grad(lambda x: jnp.sum(momentum_delta_rule(**x, implementation="xla")[0] ** 2))(
            x
        )

    looped = jax.tree.map(lambda *x: jnp.stack(x), *(gradient(x) for x in stack))
    assert max(relative_errors(jax.jit(jax.vmap(gradient))(stacked), looped).values()) <= 1e-5


@pytest.mark.parametrize("explicit_p", [False, True])
def test_gradient_of_gradient_matches_the_scan(explicit_p, x64):
    """Reverse mode over reverse mode, over several chunks and blocks."""
    inputs = random_inputs(
        seed=4,
        batch=1,
        length=11,
        heads=1,
        value_heads=2,
        key_dim=4,
        value_dim=3,
        dtype="float64",
        explicit_p=explicit_p,
    )

    def loss(x, implementation):
        o, state = momentum_delta_rule(**x, chunk_size=3, implementation=implementation)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(state.s) + jnp.cos(state.m))

    def steepness(x, implementation):
        gradient = jax.grad(loss)(x, implementation)
        return sum(jnp.sum(y**2) for y in jax.tree.leaves(gradient))

    second = jax.jit(jax.grad(steepness), static_argnums=1)
    errors = relative_errors(second(inputs, "xla"), second(inputs, "scan"))
    assert max(errors.values()) <= 1e-10, errors


def test_forward_mode_is_for_the_scan():
    inputs = random_inputs(seed=5, length=8)

    def derivative(implementation):
        def outputs(v):
            return momentum_delta_rule(**(inputs | {"v": v}), implementation=implementation)[0]

        return jax.jvp(outputs, (inputs["v"],), (inputs["v"],))[1]

    assert bool(jnp.isfinite(derivative("scan")).all())
    with pytest.raises(TypeError, match=r'implementation: expected "scan" .*, got "xla"'):
        derivative("xla")


def test_traced_scale_has_a_gradient():
    inputs = random_inputs(seed=6, length=40)

    def loss(scale, implementation):
        o, _ = momentum_delta_rule(**inputs, scale=scale, implementation=implementation)
        return jnp.sum(o**2)

    slope = jax.jit(jax.grad(loss), static_argnums=1)
    expected, actual = (slope(0.3, name) for name in ("scan", "xla"))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_scan_gradient_at_4096_steps_fits_in_a_few_hundred_mebibytes():
    """A plain scan would keep 2 states a step: 1 GiB here."""
    memory = gradient_memory("scan", batch=1, length=4096, heads=2, key_dim=128, value_dim=128)
    assert memory <= 300 * 2**20, memory / 2**20


def test_xla_residuals_are_linear_in_length():
    """Twice the length, at most about twice the memory; far below one state a step."""
    short = gradient_memory("xla", batch=1, length=2048, heads=2, key_dim=128, value_dim=128)
    long = gradient_memory("xla", batch=1, length=4096, heads=2, key_dim=128, value_dim=128)
    assert long <= 2.1 * short
    assert long <= 60 * 2**20, long / 2**20


def gradient_memory(implementation, *, batch, length, heads, key_dim, value_dim):
    """Peak bytes of temporaries of one compiled gradient."""
    wide = jax.ShapeDtypeStruct((batch, length, heads, key_dim), jnp.float32)
    value = jax.ShapeDtypeStruct((batch, length, heads, value_dim), jnp.float32)
    gate = jax.ShapeDtypeStruct((batch, length, heads), jnp.float32)

    def loss(*arrays):
        return momentum_delta_rule(*arrays, implementation=implementation)[0].sum()

    gradient = jax.jit(jax.grad(loss, argnums=tuple(range(7))))
    compiled = gradient.lower(wide, wide, value, gate, gate, gate, gate).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@IMPLEMENTATIONS
def test_export_of_any_length(implementation):
    """One program for all lengths, gradients too."""
    inputs = random_inputs(seed=6, batch=1, length=150, heads=1, initial_state=False)

    def loss(x):
        o, state = momentum_delta_rule(**x, implementation=implementation)
        return jnp.sum(o * o) + jnp.sum(state.s * state.m)

    both = jax.jit(jax.value_and_grad(loss))
    (length,) = jax.export.symbolic_shape("T")
    shapes = {
        name: jax.ShapeDtypeStruct((1, length, *x.shape[2:]), x.dtype) for name, x in inputs.items()
    }
    exported = jax.export.export(both)(shapes)
    for count in (1, 150):
        cut = {name: x[:, :count] for name, x in inputs.items()}
        (value, gradients), (expected, wanted) = exported.call(cut), both(cut)
        assert float(value) == pytest.approx(float(expected), rel=1e-5)
        assert max(relative_error(gradients[x], wanted[x]) for x in wanted) <= 2e-5
    with pytest.raises(ValueError, match="pallas_triton"), target_gpu():
        jax.export.export(
            jax.jit(partial(momentum_delta_rule, implementation="pallas_triton")),
            platforms=["cuda"],
        )(**shapes)


def test_a_state_of_zeros_can_be_donated():
    inputs = random_inputs(seed=7, batch=1, length=1, initial_state=False)
    sizes = (*inputs["v"].shape[::2], inputs["k"].shape[-1], inputs["v"].shape[-1])
    step = jax.jit(
        lambda state: momentum_delta_rule(**inputs, initial_state=state)[1], donate_argnums=0
    )
    state = MDNState.zeros(*sizes)
    assert state.s.unsafe_buffer_pointer() != state.m.unsafe_buffer_pointer()
    state = step(step(state))
    assert bool(jnp.isfinite(state.s).all())


def test_export_for_a_gpu_that_is_elsewhere():
    inputs = random_inputs(seed=8, batch=1, length=70, heads=1, initial_state=False)

    def both(x, implementation):
        return jax.grad(
            lambda x: jnp.sum(momentum_delta_rule(**x, implementation=implementation)[0])
        )(x)

    def exported(implementation):
        return jax.export.export(
            jax.jit(partial(both, implementation=implementation)),
            platforms=["cuda"],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(TRITON_CALL)],
        )(inputs)

    with target_gpu((9, 0)):
        for implementation in (None, "pallas_triton"):
            text = exported(implementation).mlir_module()
            assert text.count(TRITON_CALL) > 5
            assert "mdn_gate_bwd" in text
        assert TRITON_CALL not in exported("xla").mlir_module()
    with pytest.raises(ValueError, match=r"expects a CUDA GPU .*target_gpu"):
        exported("pallas_triton")
    with (
        pytest.raises(ValueError, match=r"capability: expected one of .*, got \(7, 5\)"),
        target_gpu((7, 5)),
    ):
        pass
