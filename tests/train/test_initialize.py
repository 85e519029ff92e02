"""Parameters made one block at a time are those of the model."""

import jax
import numpy as np
from flax import nnx

from mdn_jax import MDNForCausalLM
from tests.models.test_mixers import THREE
from train.config_sections import MeshConfig
from train.initialize import initial_params, random_numbers_by_a_kernel
from train.parallel.sharding import make_mesh, with_shardings


def test_a_hybrid_of_three_mixers():
    expected = nnx.to_pure_dict(nnx.state(MDNForCausalLM(THREE, rngs=nnx.Rngs(3)), nnx.Param))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    params = initial_params(THREE, seed=3, like=with_shardings(expected, mesh))
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), params, expected
    )


def test_a_gpu_draws_by_a_kernel_inside_and_as_before_outside():
    def program():
        draw = jax.jit(lambda key: jax.random.normal(key, (8,))).trace(jax.random.key(0))
        return draw.lower(lowering_platforms=("cuda",)).as_text()

    with random_numbers_by_a_kernel():
        assert "cu_threefry2x32" in program()
    assert "cu_threefry2x32" not in program()
