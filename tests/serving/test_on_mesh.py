"""A server over a mesh makes the texts of one device."""

import pytest

from tests.mesh_program import report

pytestmark = pytest.mark.slow


def test_texts_over_four_devices_are_those_of_one():
    found = report("tests.serving.engine_on_mesh")
    one, mesh = found["one"], found["mesh"]
    assert mesh["tokens"] == one["tokens"]
    assert [len(tokens) for tokens in one["tokens"]] == [3, 7, 11, 15, 19]
    assert one["memory"] == [2, 2, 4, 4]
    assert mesh["ways"] == one["ways"] == 1
    assert mesh["memory"] == [1, 1, 4, 4]  # slots and heads are cut
