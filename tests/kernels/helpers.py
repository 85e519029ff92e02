"""What the kernels' tests share: the operator on the kernels in the interpreter."""

from functools import cache

import jax

from mdn_jax.ops.kernels import kernel_rule
from mdn_jax.testing import outputs_and_gradients, random_cotangents
from pallas_kernels.tiling import Tiles

# several blocks of K and V at the smallest dims
SMALL = Tiles()._replace(
    **{name: 16 for name in Tiles._fields if name.endswith(("_block_k", "_block_v"))}
)


def interpreted_rule(*, resident=None, pieces=1, **arguments):
    """`momentum_delta_rule` on the kernels, interpreted; two options are those of `Tiles`."""
    tiles = SMALL._replace(state_fwd_resident=resident, state_bwd_resident=resident, pieces=pieces)
    return kernel_rule(**arguments, tiles=tiles, interpret=True)


@cache
def _compiled(options):
    def rule(**inputs):
        return interpreted_rule(**inputs, **dict(options))

    return jax.jit(outputs_and_gradients(rule))


def kernel_outputs_and_gradients(inputs, cotangent=None, **options):
    """((o, state), gradients by name); one compilation for each shape and set of options."""
    run = _compiled(tuple(sorted(options.items())))
    return run(inputs, random_cotangents(inputs) if cotangent is None else cotangent)
