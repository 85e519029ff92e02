"""Stretches of rows on several devices, on kernels that find their maps, against the scan."""

import pytest

from mdn_jax.testing import LIMITS
from pallas_kernels.tiling import choose_pieces
from tests.mesh_program import report


@pytest.fixture(scope="module")
def errors():
    return report("tests.kernels.stretch_runs")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["2 x 4", "4 x 1"])
def test_many_devices_give_what_the_scan_does(errors, case):
    """Every gate regime, documents on every seam, gradients of all arrays and the state before."""
    assert {"0.0", "0.1.s", "0.1.m", "1.initial_state.s", "1.log_mu"} < errors[case].keys()
    for name, error in errors[case].items():
        limit = LIMITS["float32"].gradients if name[0] == "1" else LIMITS["float32"].outputs
        assert error <= limit, name


@pytest.mark.slow
def test_what_is_not_finite_stays_in_its_document(errors):
    assert not any(errors["nan"].values())


def test_pieces_of_a_stretch():
    """Where one piece fills the device a second one has nothing to give."""
    assert choose_pieces(128, 256, 48, 64, stretches=True) == 1
    assert choose_pieces(128, 256, 2, 1024, stretches=True) > 4
    assert choose_pieces(128, 256, 2, 3, stretches=True) <= 3
