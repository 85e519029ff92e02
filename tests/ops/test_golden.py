"""Golden vectors made with the published implementation, in float64."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.testing import relative_error
from tests.golden import golden_files

FILES = {path.stem: path for path in golden_files("op_*.npz")}
CASES = sorted(FILES)
INDEX = json.loads(golden_files("index.json")[0].read_text())["op"]


def golden_errors(data, dtype, implementation):
    """Relative error of every output and gradient of a golden case."""
    names = ["q", "k", "v", "log_alpha", "log_mu", "beta", "eta", "S0", "M0"]
    arrays = {n: jnp.asarray(data[n], dtype) for n in [*names, *(["p"] if "p" in data else [])]}
    normalize = bool(data["use_qk_l2norm_in_kernel"])

    @jax.jit
    def run(arrays, cotangents):
        def rule(x):
            p = x.get("p")
            if p is not None and normalize:
                p = p / jnp.sqrt((p * p).sum(-1, keepdims=True) + 1e-6)
            if p is not None and data["use_p_times_alpha"]:
                p = jnp.repeat(p, x["v"].shape[2] // p.shape[2], axis=2)
                p = p * jnp.exp(x["log_alpha"])[..., None]
            o, state = momentum_delta_rule(
                *(x[n] for n in names[:7]),
                p=p,
                scale=float(data["scale"]),
                initial_state=MDNState(x["S0"], x["M0"]),
                normalize_qk=normalize,
                implementation=implementation,
            )
            return o, state.s, state.m

        outputs, pullback = jax.vjp(rule, arrays)
        return outputs, pullback(cotangents)[0]

    cotangents = tuple(jnp.asarray(data[n], dtype) for n in ("ct_o", "ct_S", "ct_M"))
    outputs, gradients = run(arrays, cotangents)
    errors = {n: relative_error(x, data[n]) for n, x in zip(("o", "S", "M"), outputs, strict=True)}
    return errors | {f"g_{n}": relative_error(x, data[f"g_{n}"]) for n, x in gradients.items()}


def test_all_cases_are_here():
    assert len(CASES) >= 5
    assert {case.removeprefix("op_") for case in CASES} <= set(INDEX)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["scan", "xla"])
@pytest.mark.parametrize("case", CASES)
def test_golden_float64(case, implementation, x64):
    errors = golden_errors(np.load(FILES[case]), "float64", implementation)
    assert max(errors.values()) <= 2e-6, errors


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["scan", "xla"])
@pytest.mark.parametrize("case", CASES)
def test_golden_float32(case, implementation):
    errors = golden_errors(np.load(FILES[case]), "float32", implementation)
    plain = INDEX[case.removeprefix("op_")]["fp32_recurrent_rel_err"]
    for name, error in errors.items():
        allowed = 1e-4 if name.startswith("g_") else 2e-5
        assert error <= max(allowed, 3 * (plain.get(name) or 0.0)), (name, error)
