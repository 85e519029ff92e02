"""The one policy of dtypes and precisions."""

import jax.numpy as jnp
import pytest

from pallas_kernels.lowering import PARTS
from pallas_kernels.momentum_delta import Numerics


@pytest.mark.parametrize(
    ("dtype", "full_precision", "capability", "expected"),
    [
        ("float32", False, (9, 0), ("float32", "float32", "float32")),
        ("float32", True, (9, 0), ("float32", "float32", "float32")),
        ("bfloat16", False, (8, 0), ("bfloat16", "bfloat16", "float16")),
        ("float16", False, (9, 0), ("float16", "float16", "float16")),
        ("bfloat16", True, (9, 0), ("bfloat16", "float32", "float32")),
        ("bfloat16", True, (8, 0), ("float32", "float32", "float32")),
        ("float16", True, (9, 0), ("float32", "float32", "float32")),
    ],
)
def test_dtypes(dtype, full_precision, capability, expected):
    """Of what the kernels get, of matrices in a chunk, of what is handed on."""
    numerics = Numerics.choose(dtype, full_precision=full_precision, capability=capability)
    dtypes = numerics.dtype, numerics.operands, numerics.storage
    assert dtypes == tuple(map(jnp.dtype, expected))
    assert numerics.scaled == (expected[2] == "float16")


def test_precisions():
    default, full = (
        Numerics.choose("bfloat16", full_precision=full, capability=(9, 0))
        for full in (False, True)
    )
    assert default.coefficients.name == "TF32_TF32_F32"
    assert full.coefficients == full.exact == default.exact
    assert (default.products, full.products) == (default.exact, PARTS)
    interpreted = default._replace(interpret=True)
    assert interpreted.coefficients == interpreted.products == interpreted.exact
    assert interpreted.exact.name == "HIGHEST"
