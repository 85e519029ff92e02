"""Random gates, plain numpy, and the operator as the system under test."""

import jax.numpy as jnp
import numpy as np

from mdn_jax import MDNState, momentum_delta_rule


def random_gates(seed, shape, *, reach=2.0):
    """alpha, mu in [0, 1), beta in [0, reach), eta in [0, 2); a tenth of each exactly 0."""
    rng = np.random.default_rng(seed)
    gates = [rng.random(shape) * x for x in (1.0, 1.0, reach, 2.0)]
    return [np.where(rng.random(shape) < 0.1, 0.0, x) for x in gates]


def numpy_matrices(alpha, mu, beta, eta, erase=None):
    """The step's matrix by its definition: the recurrence applied to both unit states."""
    erase = alpha if erase is None else erase
    columns = []
    for s, m in ((1.0, 0.0), (0.0, 1.0)):
        w = erase * s
        after_m = mu * m + eta * w
        columns.append(np.stack([alpha * s - beta * after_m, after_m], axis=-1))
    return np.stack(columns, axis=-1)


def operator_rows(alpha, mu, beta, eta, values, *, seed, erase=None, orthogonal=None):
    """The operator's memory along one row of the state at every step, and its last momentum.

    Args:
      alpha: `[B, T]`, as are the others.
      values: written, one column.
      seed: of the keys, one a row of the batch, of length 1.
      erase: the erase key is this times the key; None: the operator's default.
      orthogonal: entering memory and momentum `[B]` along a direction orthogonal to the key, which
        is then the one read; None: the key's is.

    Returns:
      `[B, T]` and `[B]`.
    """
    rows, steps = alpha.shape
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(rows, 3, 3)))[0]
    key, other = basis[:, 0], basis[:, 1]
    read = key if orthogonal is None else other
    state = MDNState.zeros(rows, 1, 3, 1, jnp.float64)
    if orthogonal is not None:
        state = MDNState(*(jnp.asarray((x[:, None] * other)[:, None, :, None]) for x in orthogonal))

    def every_step(x):
        return jnp.asarray(np.broadcast_to(x[:, None, None], (rows, steps, 1, 3)))

    with np.errstate(divide="ignore"):
        logs = [np.log(alpha), np.log(mu)]
    o, state = momentum_delta_rule(
        every_step(read),
        every_step(key),
        jnp.asarray(values)[:, :, None, None],
        *(jnp.asarray(x)[:, :, None] for x in (*logs, beta, eta)),
        p=None if erase is None else every_step(erase * key),
        initial_state=state,
        scale=1.0,
        normalize_qk=False,
        implementation="scan",
    )
    momentum = np.einsum("bk,bk->b", np.asarray(state.m)[:, 0, :, 0], read)
    return np.asarray(o)[:, :, 0, 0], momentum
