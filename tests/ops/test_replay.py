"""Replay against the definition; going back; rows that rest."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdn_jax import momentum_delta_rule
from mdn_jax.ops.replay import fold, replay_state, replay_steps, rewind
from mdn_jax.ops.state import full, keep
from mdn_jax.testing import GATE_REGIMES, random_inputs, relative_errors

LENGTH = 4
steps = jax.jit(partial(replay_steps, implementation="xla"))
small = partial(random_inputs, batch=2, heads=1, value_heads=2, key_dim=8, value_dim=6)


def split(inputs, at):
    return [
        {name: x[:, part] for name, x in inputs.items()} for part in (slice(at), slice(at, None))
    ]


@pytest.mark.parametrize("explicit_p", [False, True])
def test_every_gate_regime_is_exact(explicit_p):
    """Writes after 8, 12, ... steps; a step that forgets everything among them."""
    regimes = tuple(GATE_REGIMES)
    with jax.enable_x64(True):
        inputs = small(
            seed=0,
            batch=len(regimes),
            length=21,
            regime=regimes,
            keys=("random", "parallel", "zero"),
            explicit_p=explicit_p,
            dtype="float64",
        )
        for gate in ("log_alpha", "log_mu"):
            inputs[gate] = inputs[gate].at[::2, 9].set(-jnp.inf)
        state = inputs.pop("initial_state")
        expected = momentum_delta_rule(**inputs, initial_state=state, implementation="scan")
        o, after = steps(
            **inputs, initial_state=replay_state(state, LENGTH, heads=1, dtype="float64")
        )
        errors = relative_errors((o, fold(after)), expected)
        assert max(errors.values()) <= 1e-13, errors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16_scaled"])
def test_one_at_a_time_and_states_of_any_kind(dtype):
    inputs = small(seed=1, length=2 * LENGTH + 1, dtype="bfloat16")
    kept = keep(inputs.pop("initial_state"), dtype)
    expected = momentum_delta_rule(**inputs, initial_state=full(kept), implementation="scan")
    state, outputs = replay_state(kept, LENGTH, heads=1, dtype="bfloat16"), []
    for t in range(2 * LENGTH + 1):
        o, state = steps(**{n: x[:, t : t + 1] for n, x in inputs.items()}, initial_state=state)
        outputs.append(o)
        moved = jax.tree.map(lambda x, y: bool((x != y).any()), state.base, kept)
        assert any(jax.tree.leaves(moved)) == (t == 2 * LENGTH - 1 or t == 2 * LENGTH)
    assert state.kept.tolist() == [LENGTH + 1] * 2
    tolerance = 4e-3 if dtype == "float32" else 1e-2
    errors = relative_errors((jnp.concatenate(outputs, 1), full(fold(state))), expected)
    assert max(errors.values()) <= tolerance, errors


def test_going_back_is_as_if_it_had_not_been():
    """Bit for bit, over a write, and rows by different numbers of steps."""
    inputs = small(seed=2, length=14)
    start = replay_state(inputs.pop("initial_state"), LENGTH, heads=1)
    before, rest = split(inputs, 9)
    _, state = steps(**before, initial_state=start)
    two, _ = split(rest, 2)
    _, one_more = steps(**{n: x[:, :1] for n, x in two.items()}, initial_state=state)
    _, two_more = steps(**two, initial_state=state)
    assert two_more.kept.tolist() == [7, 7]
    other = small(seed=3, length=14)
    del other["initial_state"]
    o, _ = steps(**other, initial_state=rewind(two_more, jnp.asarray([2, 1])))
    from_two, _ = steps(**other, initial_state=state)
    from_one, _ = steps(**other, initial_state=one_more)
    np.testing.assert_array_equal(o[0], from_two[0])
    np.testing.assert_array_equal(o[1], from_one[1])


def test_steps_that_do_not_count_leave_no_trace():
    inputs = small(seed=4, length=15)
    start = replay_state(inputs.pop("initial_state"), LENGTH, heads=1)
    active = jnp.ones((2, 15, 1), bool).at[0, 3:11].set(False)
    spoiled = inputs | {"v": inputs["v"].at[0, 3:11].set(jnp.nan)}
    o, after = steps(**spoiled, initial_state=start, active=active)
    own = {n: jnp.concatenate([x[:1, :3], x[:1, 11:]], axis=1) for n, x in inputs.items()}
    expected = steps(**own, initial_state=jax.tree.map(lambda x: x[:1], start))
    got = jnp.concatenate([o[:1, :3], o[:1, 11:]], axis=1)
    after = jax.tree.map(lambda x: x[:1], fold(after))
    errors = relative_errors((got, after), (expected[0], fold(expected[1])))
    assert max(errors.values()) <= 1e-6, errors


def test_what_does_not_fit_is_one_line():
    inputs = small(seed=5, length=1)
    state = replay_state(inputs.pop("initial_state"), LENGTH, heads=1)
    with pytest.raises(ValueError, match="replay: expected 2, 4, 8 or 16, got 3"):
        replay_state(state.base, 3)
    with pytest.raises(ValueError, match="steps: expected 0 to 0 in row 0, got 1"):
        rewind(state, 1)
    with pytest.raises(TypeError, match="initial_state: expected a ReplayState, got MDNState"):
        replay_steps(**inputs, initial_state=state.base)
    with pytest.raises(TypeError, match=r"k: expected 1 heads of float32 .*, got 1 of bfloat16"):
        replay_steps(**small(seed=5, length=1, dtype="bfloat16") | {"initial_state": state})
    with pytest.raises(ValueError, match='implementation: "pallas_triton" expects a CUDA GPU'):
        replay_steps(**inputs, initial_state=state, implementation="pallas_triton")
