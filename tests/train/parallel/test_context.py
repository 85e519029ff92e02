"""Rows whose tokens lie on several devices: a whole run is that of one device."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from mdn_jax import MDNConfig
from mdn_jax.errors import RunError
from tests.tiny import TINY_MODEL
from tests.train.helpers import tiny_config
from train.parallel.sharding import AXES, batch_sharding, check_context, from_global, make_mesh


@pytest.fixture(scope="module")
def report(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("context")
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.parallel.context_runs", str(corpus), str(output)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_run_from_the_command_line_is_that_of_one_device(report):
    """Mixers of three kinds, micro-batches, Muon, an average, the guard; what it measures too."""
    one, two = report["one"], report["two"]
    assert len(one["losses"]) == 6
    assert one["losses"][-1] < one["losses"][0] - 0.1
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    assert two["others"].keys() == one["others"].keys()
    assert {"held_out_loss", "held_out_loss_ema", "layers.1.memory_norm"} < one["others"].keys()
    for name, value in one["others"].items():
        assert two["others"][name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.slow
def test_fine_tuning_begins_where_the_run_ended(report):
    assert report["tuned"]["losses"][0] < report["two"]["losses"][0] - 0.3
    assert report["tuned"]["others"]["held_out_loss"] < report["two"]["others"]["held_out_loss"]


@pytest.mark.slow
def test_the_step_is_lowered_for_gpus_with_the_kernels(report):
    """The rule with the maps of stretches; convolutions with what is before them."""
    assert all(report["lowered"].values()), report["lowered"]


@pytest.mark.parametrize(
    ("parts", "changes", "words"),
    [
        (3, {}, r"mesh\.context: expected a divisor of sequence_length = 16, got 3"),
        (
            8,
            {},
            r"mesh\.context: expected stretches of at least 4 tokens \(model\.conv_size\), got 2: "
            "sequence_length = 16 over 8",
        ),
        (2, {"mixer": "gdn2"}, r"mesh\.context: expected 1 with the mixer gdn2, got 2"),
        (1, {"mixer": "gdn2"}, None),
        (4, {"mixer": "kda"}, None),
        (8, {"use_short_conv": False}, None),
    ],
)
def test_what_cannot_be_cut_is_named(corpus, tmp_path, parts, changes, words):
    config = tiny_config(corpus, tmp_path / "run")
    config = dataclasses.replace(config, model=MDNConfig(**TINY_MODEL | changes))
    mesh = AbstractMesh((1, 1, parts, 1), AXES)
    if words is None:
        check_context(config, mesh)
        return
    with pytest.raises(RunError, match=words):
        check_context(config, mesh)


def test_a_batch_is_cut_by_rows_and_tokens(corpus, tmp_path):
    config = tiny_config(corpus, tmp_path / "run")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    rows = np.arange(12, dtype=np.int32).reshape(3, 4)
    placed = from_global(mesh, {"tokens": rows})["tokens"]
    assert placed.sharding == batch_sharding(mesh)
    assert tuple(placed.sharding.spec) == (("data", "fsdp"), "context")
    np.testing.assert_array_equal(placed, rows)
