"""The kernels in the interpreter against the scan: values, final states and every gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from mdn_jax import MDNState
from mdn_jax.testing import GATE_REGIMES, random_inputs, relative_error, relative_errors
from pallas_kernels.lowering import kernel_call
from pallas_kernels.momentum_delta.layout import launches
from pallas_kernels.momentum_delta.vjp import CHUNK_FACTORS, CHUNK_STATES
from tests.kernels.helpers import GATES, kernel_outputs_and_gradients, kernel_rule
from tests.ops.helpers import cotangents, outputs_and_gradients

small_inputs = partial(random_inputs, batch=1, heads=1, key_dim=16, value_dim=16, length=20)
# two value heads a key head, three chunks, the last one ragged
packed_inputs = partial(
    random_inputs, batch=1, heads=1, value_heads=2, key_dim=32, value_dim=32, length=130
)


def assert_matches_scan(inputs, tolerance, **options):
    actual = kernel_outputs_and_gradients(inputs, **options)
    expected = outputs_and_gradients(inputs, implementation="scan", **options)
    errors = relative_errors(actual, expected)
    assert max(errors.values()) <= tolerance, errors


@pytest.mark.slow
def test_float32_matches_scan_in_every_regime():
    for seed, regime in enumerate(GATE_REGIMES):
        for keys in ("random", "parallel", "zero"):
            inputs = small_inputs(
                seed=seed, length=130, key_dim=32, value_dim=32, regime=regime, keys=keys
            )
            assert_matches_scan(inputs, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_lengths(length):
    assert_matches_scan(small_inputs(seed=length, length=length), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("p_heads", [None, 1, 2])
def test_packed_documents_and_grouped_heads(p_heads):
    """A reset is a log gate of -110, so float32 sums of log gates lose two digits to it."""
    inputs = packed_inputs(seed=4, documents=5, explicit_p=p_heads is not None)
    if p_heads == 2:
        inputs["p"] = jnp.concatenate([inputs["p"], -0.5 * inputs["p"]], axis=2)
    assert_matches_scan(inputs, 5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("initial_state", [True, False])
def test_walks_in_halves(initial_state):
    """Four walks of three chunks, three programs at once: two walks cross a launch."""
    inputs = packed_inputs(seed=15, documents=2, initial_state=initial_state)
    whole, cut = (kernel_outputs_and_gradients(inputs, resident=n) for n in (None, 3))
    jax.tree.map(np.testing.assert_array_equal, cut, whole)


@pytest.mark.parametrize(
    ("walks", "resident"), [(4, 3), (384, 264), (265, 264), (576, 264), (7, 5)]
)
def test_no_second_half_is_launched_with_its_first(walks, resident):
    cut = launches(walks, resident)
    assert len(cut) < 2 * -(-walks // resident)
    numbers = [range(x.first, x.first + x.programs) for x in cut]
    assert [n for launch in numbers for n in launch] == list(range(2 * walks))
    for launch in numbers:
        assert len(launch) <= resident
        assert not any(n + walks in launch for n in launch)


@pytest.mark.parametrize(
    ("walks", "resident"),
    [(4, None), (4, 4), (512, 264), (3, 4), (1, 264), (132, 264), (793, 264), (24_576, 264)],
)
def test_walks_stay_whole_where_halves_would_take_as_long_or_be_many(walks, resident):
    assert launches(walks, resident) == [None]


@pytest.mark.slow
def test_without_entering_memory():
    inputs = small_inputs(seed=16, length=70, initial_state=False)
    assert_matches_scan(inputs, 2e-5)


@pytest.mark.slow
def test_dims_that_need_padding():
    assert_matches_scan(small_inputs(seed=5, key_dim=24, value_dim=40), 2e-5)


@pytest.mark.slow
def test_keys_as_they_are_and_scale():
    inputs = small_inputs(seed=6, explicit_p=True)
    inputs["k"] *= 0.25
    assert_matches_scan(inputs, 2e-5, normalize_qk=False, scale=0.7)


@pytest.mark.parametrize("gate", ["log_alpha", "log_mu"])
def test_gates_of_exactly_zero(gate):
    inputs = small_inputs(seed=7)
    inputs[gate] = inputs[gate].at[:, ::3].set(-jnp.inf)
    assert_matches_scan(inputs, 5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(dtype):
    """Against float32 arithmetic on the same, rounded inputs."""
    inputs = packed_inputs(seed=8, dtype=dtype, documents=3, explicit_p=True)
    cotangent = cotangents(inputs)
    (o, state), gradients = kernel_outputs_and_gradients(inputs, cotangent)
    assert o.dtype == gradients["q"].dtype == gradients["v"].dtype == gradients["p"].dtype == dtype
    assert state.s.dtype == state.m.dtype == gradients["log_alpha"].dtype == jnp.float32
    expected = outputs_and_gradients(*widen((inputs, cotangent)), implementation="scan")
    values = relative_errors((o, state), expected[0])
    assert max(values.values()) <= 5e-3, values
    errors = relative_errors(gradients, expected[1])
    assert max(errors.values()) <= 1e-2, errors


@pytest.mark.slow
@pytest.mark.parametrize("explicit_p", [False, True])
def test_precise(explicit_p):
    """One head alone, whose gradients of gates may all but cancel: 16 bits would be off by 1e-2."""
    for seed, regime in enumerate(GATE_REGIMES):
        for keys in ("random", "parallel", "zero"):
            inputs = small_inputs(
                seed=seed,
                length=130,
                key_dim=32,
                value_dim=32,
                regime=regime,
                keys=keys,
                documents=2,
                dtype=jnp.bfloat16,
                explicit_p=explicit_p,
            )
            cotangent = cotangents(inputs)
            actual, gradients = kernel_outputs_and_gradients(inputs, cotangent, precise=True)
            assert actual[0].dtype == gradients["v"].dtype == gradients["q"].dtype == jnp.bfloat16
            expected, right = outputs_and_gradients(
                *widen((inputs, cotangent)), implementation="scan"
            )
            assert relative_error(actual[0], expected[0]) <= 2.5e-3  # the rounding of o
            errors = relative_errors((actual[1], gradients), (expected[1], right))
            assert max(errors.values()) <= 5e-3, (regime, keys, errors)
            errors = {
                name: x for name, x in errors.items() if not name.endswith(("q", "k", "v", "p"))
            }
            assert max(errors.values()) <= 2e-4, (regime, keys, errors)


def widen(tree):
    """Arrays of 16 bits as float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype.itemsize == 2 else x, tree)


@pytest.mark.slow
@pytest.mark.parametrize("start", [40, 64])
def test_no_gradient_crosses_a_document_boundary(start):
    inputs = packed_inputs(seed=9)
    inputs["segment_ids"] = jnp.where(jnp.arange(130) < start, 3, 7)[None]
    d_o, d_state = cotangents(inputs)
    late = jnp.arange(130)[None, :, None, None] >= start

    _, second = kernel_outputs_and_gradients(inputs, (jnp.where(late, d_o, 0), d_state))
    for name in ("q", "k", "v", *GATES):
        assert not np.any(second[name][:, :start]), name
        assert np.any(second[name][:, start:]), name
    for name in ("log_alpha", "log_mu"):
        assert not np.any(second[name][:, start]), name
    assert not any(np.any(x) for x in second["initial_state"])

    d_state = jax.tree.map(jnp.zeros_like, d_state)
    _, first = kernel_outputs_and_gradients(inputs, (jnp.where(late, 0, d_o), d_state))
    for name in ("q", "k", "v", *GATES):
        assert not np.any(first[name][:, start:]), name
        assert np.any(first[name][:, :start]), name


@pytest.mark.slow
def test_outputs_depend_on_no_other_document():
    inputs = packed_inputs(seed=10)
    inputs["segment_ids"] = jnp.where(jnp.arange(130) < 40, 0, 1)[None]
    (o, state), _ = kernel_outputs_and_gradients(inputs)
    for name in ("q", "k", "v"):
        inputs[name] = inputs[name].at[:, :40].multiply(-3)
    inputs["initial_state"] = jax.tree.map(lambda x: 100 * x, inputs["initial_state"])
    (other_o, other_state), _ = kernel_outputs_and_gradients(inputs)
    np.testing.assert_array_equal(other_o[:, 40:], o[:, 40:])
    jax.tree.map(np.testing.assert_array_equal, other_state, state)


@pytest.mark.slow
def test_runs_are_identical_to_the_bit():
    inputs = packed_inputs(seed=11, documents=3)
    first, second = (kernel_outputs_and_gradients(inputs) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
def test_vmap_equals_a_loop():
    stack = [small_inputs(seed=seed, documents=2) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *stack)
    cotangent = jax.tree.map(lambda *x: jnp.stack(x), *map(cotangents, stack))

    def gradient(x, cotangent):
        ids = x.pop("segment_ids")
        outputs, pullback = jax.vjp(lambda x: kernel_rule(**x, segment_ids=ids), x)
        return outputs, pullback(cotangent)[0]

    mapped = jax.jit(jax.vmap(gradient))(stacked, cotangent)
    looped = jax.tree.map(lambda *x: jnp.stack(x), *map(kernel_outputs_and_gradients, stack))
    assert max(relative_errors(mapped, looped).values()) <= 1e-6


def squares(q, v, *, inputs):
    o, state = kernel_rule(**(inputs | {"q": q, "v": v}))
    return jnp.sum(o**2) + jnp.sum(state.s**2) + jnp.sum(state.m**2)


@pytest.mark.slow
def test_checkpoint_without_the_chunk_states(capsys):
    inputs = small_inputs(seed=12, length=70)
    loss = partial(squares, inputs=inputs)
    names = jax.checkpoint_policies.save_only_these_names
    kept = jax.checkpoint(loss, policy=names(CHUNK_FACTORS, CHUNK_STATES))
    recomputed = jax.checkpoint(loss, policy=names(CHUNK_FACTORS))
    for function, states in ((kept, True), (recomputed, False)):
        jax.ad_checkpoint.print_saved_residuals(function, inputs["q"], inputs["v"])
        saved = capsys.readouterr().out
        assert CHUNK_FACTORS in saved
        assert (CHUNK_STATES in saved) == states
    expected = jax.jit(jax.grad(loss, (0, 1)))(inputs["q"], inputs["v"])
    actual = jax.jit(jax.grad(recomputed, (0, 1)))(inputs["q"], inputs["v"])
    assert max(relative_errors(actual, expected).values()) <= 1e-6


@pytest.mark.slow
def test_shard_map_over_batch_and_heads():
    """Without `check_vma`: jax's interpreter of kernels does not know it (compiled ones do)."""
    inputs = small_inputs(seed=13)
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    per_step = PartitionSpec("data", None, "tensor")
    per_state = PartitionSpec("data", "tensor")
    specs = dict.fromkeys(inputs, per_step) | {"initial_state": MDNState(per_state, per_state)}
    rule = jax.shard_map(
        lambda x: kernel_rule(**x),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(per_step, MDNState(per_state, per_state)),
        check_vma=False,
    )

    @jax.jit
    def gradient(x, cotangent):
        outputs, pullback = jax.vjp(rule, x)
        return outputs, pullback(cotangent)[0]

    actual = gradient(inputs, cotangents(inputs))
    expected = kernel_outputs_and_gradients(inputs)
    assert max(relative_errors(actual, expected).values()) <= 1e-6


def test_interpreter_fills_what_a_kernel_leaves_out_with_nan():
    """Or finite results here would say nothing of what the kernels write."""

    def body(x, out):
        out[0, :] = x[0, :]

    spec = pl.BlockSpec((2, 16), lambda i: (i, 0))
    out = kernel_call(
        body,
        jnp.ones((4, 16)),
        name="half",
        grid=(2,),
        in_specs=[spec],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct((4, 16), jnp.float32),
        warps=4,
        stages=1,
        interpret=True,
    )
    np.testing.assert_array_equal(out, np.repeat([[1], [np.nan]] * 2, 16, axis=1))


@pytest.mark.slow
def test_every_buffer_for_the_backward_pass_is_written():
    inputs = small_inputs(seed=14)
    _, pullback = jax.jit(lambda x: jax.vjp(lambda x: kernel_rule(**x), x))(inputs)
    residuals = jax.tree.leaves(pullback)
    assert sum(x.size for x in residuals) > 3 * 64 * 64  # the matrices of a chunk are there
    assert all(np.isfinite(x).all() for x in residuals)
