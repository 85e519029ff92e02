"""Parameters made one block at a time are those of the model."""

import jax
import numpy as np
from flax import nnx

from mdn_jax import MDNForCausalLM
from tests.models.test_mixers import THREE
from train.config_sections import MeshConfig
from train.initialize import initial_params
from train.parallel.sharding import make_mesh, with_shardings


def test_a_hybrid_of_three_mixers():
    expected = nnx.to_pure_dict(nnx.state(MDNForCausalLM(THREE, rngs=nnx.Rngs(3)), nnx.Param))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    params = initial_params(THREE, seed=3, like=with_shardings(expected, mesh))
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), params, expected
    )
