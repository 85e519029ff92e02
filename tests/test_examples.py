"""The examples, and the Python of the documents, run and show what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from examples import (
    check_your_kernel,
    documents_and_pieces,
    linen_bridge,
    own_training_loop,
)
from mdn_jax.testing import conformance_checks, random_inputs, relative_error


def test_a_right_kernel_and_a_wrong_one(capsys):
    def wrong(*, log_mu, **inputs):
        return check_your_kernel.mine(log_mu=log_mu / 2, **inputs)

    def checks(rule):
        sizes = {"chunk": 2, "key_dim": 4, "value_dim": 4}
        return [x for x in conformance_checks(rule, **sizes) if x.name == "every_regime"]

    assert check_your_kernel.failed(checks(check_your_kernel.mine)) == []
    assert capsys.readouterr().out == "ok   float32-every_regime\n"
    assert check_your_kernel.failed(checks(wrong)) == ["float32-every_regime"]
    out = capsys.readouterr().out
    assert out.startswith("FAIL float32-every_regime\n")
    assert "d_log_mu: expected errors of at most" in out


@pytest.mark.slow
def test_a_row_over_eight_devices():
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "examples.long_row"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, many = (line.split(":") for line in done.stdout.splitlines())
    assert many[0] == "data 2 x context 4"
    expected, actual = ([float(x) for x in losses.split()] for _, losses in (one, many))
    assert expected[-1] < expected[0] - 0.1
    assert actual == pytest.approx(expected, abs=2e-5)


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = {
    code: f"{page.stem}-{i}"
    for page in PAGES
    for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
    if "from openai" not in code  # of a server: tests/serving
}


@pytest.mark.parametrize("code", CODE, ids=CODE.values())
def test_code_of_the_documents_runs(code):
    names = {}
    exec(compile(code, "a document", "exec"), names)
    arrays = [x for x in jax.tree.leaves(names) if isinstance(x, jax.Array)]
    floats = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats
    assert all(bool(jnp.isfinite(x).all()) for x in floats)


@pytest.mark.slow
def test_the_own_loop_learns(monkeypatch):
    monkeypatch.setattr(own_training_loop, "ROWS", 16)
    first, last = own_training_loop.train(steps=60)
    assert first > 2.5
    assert last < 1.5


def test_documents_and_pieces():
    inputs = random_inputs(seed=0, batch=1, length=200, regime="layer", initial_state=False)
    packed, separate = jax.jit(documents_and_pieces.packed_and_separate)(inputs)
    in_pieces = jax.jit(lambda inputs: documents_and_pieces.in_pieces(inputs, 100))
    assert relative_error(packed, separate) < 1e-6
    assert relative_error(in_pieces(inputs), separate) > 1e-3


@pytest.mark.slow
def test_a_linen_model_learns():
    first, last = linen_bridge.train(steps=60)
    assert first > 2.5
    assert last < 0.3
