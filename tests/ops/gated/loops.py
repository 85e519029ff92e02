"""The recurrences of the papers over numpy arrays, one head and step at a time."""

import numpy as np


def loops(
    rule, *, q, k, v, log_alpha, initial_state, beta=None, p=None, b=None, w=None, segment_ids=None
):
    """Outputs and final state of a rule (q and k are normalised here)."""
    q, k, v, log_alpha = (np.asarray(x) for x in (q, k, v, log_alpha))
    beta = np.ones(v.shape[:3]) if beta is None else np.asarray(beta)
    erases, writes = b, w
    if rule != "mamba2":
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    states, o = np.array(initial_state), np.zeros(v.shape)
    batch, length, heads = v.shape[:3]
    per_key = heads // q.shape[2]
    identity = np.eye(q.shape[-1])
    for b, h in np.ndindex(batch, heads):
        s = states[b, h]
        for t in range(length):
            if segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]:
                s = np.zeros_like(s)
            key, write = k[b, t, h // per_key], np.outer(k[b, t, h // per_key], v[b, t, h])
            alpha, step = np.exp(log_alpha[b, t, h]), beta[b, t, h]
            if rule == "mamba2":
                s = alpha * s + step * write
            elif rule == "comba":
                erase = np.asarray(p)[b, t, h // per_key]
                s = alpha * s - step * np.outer(key, erase @ s) + step * write
            elif rule == "gdn":
                s = alpha * (identity - step * np.outer(key, key)) @ s + step * write
            elif rule == "gdn2":
                erase = np.asarray(erases)[b, t, h] * key
                s = (identity - np.outer(key, erase)) @ np.diag(alpha) @ s
                s = s + np.outer(key, np.asarray(writes)[b, t, h] * v[b, t, h])
            else:
                s = (identity - step * np.outer(key, key)) @ (alpha[:, None] * s) + step * write
            o[b, t, h] = s.T @ q[b, t, h // per_key] / np.sqrt(q.shape[-1])
        states[b, h] = s
    return o, states


def rotating_loop(q, k, v, log_alpha, dt, lam, angles, initial_state, segment_ids=None):
    """Mamba-3's state space: pairs of channels as complex numbers, a head and step at a time."""
    q, k, v, log_alpha, dt, lam, angles = map(np.asarray, (q, k, v, log_alpha, dt, lam, angles))
    memory, last_k, last_v = map(np.array, initial_state)
    turning = 2 * angles.shape[-1]
    o = np.zeros(v.shape)

    def halves(x):
        return x[:turning:2] + 1j * x[1:turning:2], x[turning:]

    for b, h in np.ndindex(v.shape[0], v.shape[2]):
        group = h * q.shape[2] // v.shape[2]
        pairs, rest = halves(memory[b, h])
        key, value = last_k[b, group], last_v[b, h]
        for t in range(v.shape[1]):
            if segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]:
                pairs, rest, key, value = 0 * pairs, 0 * rest, 0 * key, 0 * value
            alpha, step, share = np.exp(log_alpha[b, t, h]), dt[b, t, h], lam[b, t, h]
            beta, gamma = (1 - share) * step * alpha, share * step
            (old_pairs, old_rest), (new_pairs, new_rest) = halves(key), halves(k[b, t, group])
            turn = np.exp(1j * angles[b, t, group])[:, None]
            pairs = turn * (alpha * pairs + beta * np.outer(old_pairs, value))
            pairs = pairs + gamma * np.outer(new_pairs, v[b, t, h])
            rest = alpha * rest + beta * np.outer(old_rest, value)
            rest = rest + gamma * np.outer(new_rest, v[b, t, h])
            key, value = k[b, t, group], v[b, t, h]
            query_pairs, query_rest = halves(q[b, t, group])
            o[b, t, h] = (np.conj(query_pairs) @ pairs).real + query_rest @ rest
        memory[b, h, :turning:2], memory[b, h, 1:turning:2] = pairs.real, pairs.imag
        memory[b, h, turning:] = rest
    return o / np.sqrt(q.shape[-1]), (memory, k[:, -1], v[:, -1])
