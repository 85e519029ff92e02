"""What a mesh must divide, and what is said where it does not."""

import dataclasses

import jax
import pytest

from mdn_jax.errors import RunError
from tests.train.helpers import tiny_config
from train.config_sections import MeshConfig
from train.parallel.sharding import Share, make_mesh, partition
from train.run import Run


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            {"data": 3},
            "expected the number of devices, 1, got 3 x 1 x 1 x 1 = 3",
        ),
        ({"fsdp": 2}, "expected a divisor of the 1 devices beside -1, got -1 x 2 x 1 x 1"),
    ],
)
def test_a_wrong_number_of_devices_is_named(corpus, tmp_path, sizes, words):
    config = tiny_config(corpus, tmp_path / "run", mesh=MeshConfig(**sizes))
    with pytest.raises(RunError, match=words):
        Run(config)
    assert not config.directory.exists()


def test_the_rest_of_the_devices(corpus):
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}


def test_rows_of_a_share():
    assert Share(1, 4).rows(16) == slice(4, 8)
    assert Share(0, 1).rows(16) == slice(0, 16)


def test_an_unknown_parameter_is_named():
    path = tuple(jax.tree_util.DictKey(name) for name in ("layers", "new"))
    with pytest.raises(KeyError, match=r"layers\.new: expected a parameter named in"):
        partition(path, jax.ShapeDtypeStruct((2, 2), "float32"))


def test_mesh_sizes_are_checked():
    with pytest.raises(ValueError, match="mesh: expected -1 in one axis at most"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(ValueError, match=r"mesh\.tensor: expected an int >= 1 or -1, got 0"):
        dataclasses.replace(MeshConfig(), tensor=0)
