"""The kernels under transformations, in halves, and what they write.

Their values and gradients are those of tests/ops/conformance.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from mdn_jax import MDNState
from mdn_jax.testing import random_cotangents, random_inputs, relative_errors
from pallas_kernels.lowering import kernel_call
from pallas_kernels.momentum_delta.launches import launches
from pallas_kernels.momentum_delta.vjp import CHUNK_FACTORS, CHUNK_STATES
from tests.kernels.helpers import interpreted_rule, kernel_outputs_and_gradients

small_inputs = partial(random_inputs, batch=1, heads=1, key_dim=16, value_dim=16, length=20)
# two value heads a key head, three chunks, the last one ragged
packed_inputs = partial(
    random_inputs, batch=1, heads=1, value_heads=2, key_dim=32, value_dim=32, length=130
)


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
def test_vmap_equals_a_loop():
    stack = [small_inputs(seed=seed, documents=2) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *stack)
    cotangent = jax.tree.map(lambda *x: jnp.stack(x), *map(random_cotangents, stack))

    def gradient(x, cotangent):
        ids = x.pop("segment_ids")
        outputs, pullback = jax.vjp(lambda x: interpreted_rule(**x, segment_ids=ids), x)
        return outputs, pullback(cotangent)[0]

    mapped = jax.jit(jax.vmap(gradient))(stacked, cotangent)
    looped = jax.tree.map(lambda *x: jnp.stack(x), *map(kernel_outputs_and_gradients, stack))
    assert max(relative_errors(mapped, looped).values()) <= 1e-6


def squares(q, v, *, inputs):
    o, state = interpreted_rule(**(inputs | {"q": q, "v": v}))
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
        lambda x: interpreted_rule(**x),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(per_step, MDNState(per_state, per_state)),
        check_vma=False,
    )

    @jax.jit
    def gradient(x, cotangent):
        outputs, pullback = jax.vjp(rule, x)
        return outputs, pullback(cotangent)[0]

    actual = gradient(inputs, random_cotangents(inputs))
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
    _, pullback = jax.jit(lambda x: jax.vjp(lambda x: interpreted_rule(**x), x))(inputs)
    residuals = jax.tree.leaves(pullback)
    assert sum(x.size for x in residuals) > 3 * 64 * 64  # the matrices of a chunk are there
    assert all(np.isfinite(x).all() for x in residuals)
