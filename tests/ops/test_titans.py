"""The memory of Titans is the momentum delta rule with `beta = 1` and the key as the erase key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.testing import relative_errors


def memory_of_titans(q, k, v, forget, eta, theta, memory, surprise):
    """Equations 13 and 14 with `M(k) = M^T k`, one head; the gradient by differentiating a loss."""

    def loss(memory, k, v):  # half of equation 12: its gradient is that of equation 17
        return 0.5 * jnp.sum((memory.T @ k - v) ** 2)

    gradient = jax.jit(jax.grad(loss))
    outputs = []
    for t in range(len(q)):
        surprise = eta[t] * surprise - theta[t] * gradient(memory, k[t], v[t])
        memory = (1 - forget[t]) * memory + surprise
        outputs.append(memory.T @ q[t])
    return jnp.stack(outputs), memory, surprise


@pytest.mark.parametrize("implementation", ["scan", "xla"])
def test_the_rule_with_a_step_size_of_one_is_the_memory_of_titans(implementation, x64):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(9, width))) for width in (6, 6, 4))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    forget, eta, theta = jnp.asarray(rng.random((3, 9)))
    memory, surprise = (jnp.asarray(rng.normal(size=(6, 4))) for _ in range(2))
    expected = memory_of_titans(q, k, v, forget, eta, theta, memory, surprise)

    def lifted(x):  # one row, one head
        return x[None, :, None]

    options = {"scale": 1.0, "normalize_qk": False, "implementation": implementation}
    o, state = jax.jit(functools.partial(momentum_delta_rule, **options))(
        *map(lifted, (q, k, v, jnp.log1p(-forget), jnp.log(eta), jnp.ones(9), theta)),
        p=lifted(k),
        initial_state=MDNState(memory[None, None], -surprise[None, None]),
    )
    actual = o[0, :, 0], state.s[0, 0], -state.m[0, 0]
    assert max(relative_errors(actual, expected).values()) <= 1e-13
