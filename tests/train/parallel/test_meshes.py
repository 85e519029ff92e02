"""Training on many devices is training on one; a checkpoint moves between meshes."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.train.parallel.mesh_runs import EVERY, MESHES, MOVES, ONE, STEPS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("meshes")


def launch(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.train.parallel.mesh_runs", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def result(process):
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def report(corpus, output):
    return result(launch(corpus, output))


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if mesh != ONE])
def test_losses_are_those_of_one_device(report, mesh):
    losses, expected = report["losses"][mesh], report["losses"][ONE]
    assert len(losses) == STEPS
    assert expected[-1] < expected[0] - 0.1  # something was learned
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("move", [f"{old} to {new}" for old, new in MOVES])
def test_a_checkpoint_goes_on_on_another_mesh(report, move):
    expected = report["losses"][ONE][STEPS // 2 :]
    np.testing.assert_allclose(report["moved"][move], expected, rtol=1e-5)


def test_on_the_same_mesh_it_goes_on_bit_for_bit(report):
    mesh = "1x1x2x1"
    assert report["moved"][f"{mesh} to {mesh}"] == report["losses"][mesh][STEPS // 2 :]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_that_is_not_finite_is_refused_by_every_device(report, mesh):
    assert report["refused"][mesh]


@pytest.mark.parametrize("mesh", ["8x1x1x1", "1x1x2x1", "2x1x4x1", EVERY])
def test_gradients_are_added_up_once_a_step(report, mesh):
    found = report["collectives"][mesh]
    assert found["outside"]["sum of arrays"] == 1  # all of them, and the loss, together
    if mesh != EVERY:  # there parameters and heads are cut too
        assert not {"sum of arrays", "sum of scalars"} & found["loop"].keys()
    if mesh == "8x1x1x1":  # micro-batches know nothing of each other
        assert found["loop"] == {}


def test_devices_that_share_heads_exchange_nothing_else(report):
    """Activations are gathered and added up, not exchanged, but for those of the embeddings."""
    assert report["collectives"][EVERY]["loop"].get("all-to-all", 0) <= 2


def test_digests_of_arrays_that_are_cut_are_those_of_whole_ones(report):
    assert report["digests"]


def test_where_parameters_are_cut_a_micro_batch_adds_up_once(report):
    assert report["collectives"]["1x8x1x1"]["loop"]["sum of arrays"] == 1


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_that_is_refused_takes_no_other_way(report, mesh):
    """The guard selects: nothing waits for its answer."""
    assert report["collectives"][mesh]["branches"] == 0


def test_two_processes(report, corpus, output):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [launch(corpus, output, port, index) for index in range(2)]
    expected = report["losses"][ONE]
    for values in map(result, processes):
        np.testing.assert_allclose(values["losses"], expected, rtol=1e-5)
        for later in ("moved", "across"):
            np.testing.assert_allclose(values[later], expected[STEPS // 2 :], rtol=1e-5)
        assert values["refused"]
