"""What the kernels' tests share: the operator's interface on the kernels in the interpreter."""

from functools import cache

import jax

from mdn_jax import MDNState
from mdn_jax.ops.inputs import document_starts
from pallas_kernels.momentum_delta import Memory, Tokens, momentum_delta
from pallas_kernels.tiling import Tiles
from tests.ops.helpers import DIFFERENTIABLE, cotangents

# several blocks of K and V at the smallest dims
SMALL = Tiles()._replace(
    **{name: 16 for name in Tiles._fields if name.endswith(("_block_k", "_block_v"))}
)
GATES = ("log_alpha", "log_mu", "beta", "eta")


def kernel_rule(
    *,
    q,
    k,
    v,
    log_alpha,
    log_mu,
    beta,
    eta,
    p=None,
    initial_state=None,
    segment_ids=None,
    scale=None,
    normalize_qk=True,
    resident=None,
    precise=False,
):
    """`momentum_delta_rule` on the kernels, interpreted; `resident` is that of `Tiles`."""
    batch, length = v.shape[:2]
    key_dim = q.shape[-1]
    o, memory = momentum_delta(
        Tokens(q, k, v, p, log_alpha, log_mu, beta, eta),
        None if initial_state is None else Memory(*initial_state),
        starts=None if segment_ids is None else document_starts(segment_ids, (batch, length)),
        scale=key_dim**-0.5 if scale is None else scale,
        normalize=normalize_qk,
        precise=precise,
        tiles=SMALL._replace(advance_resident=resident, retreat_resident=resident),
        interpret=True,
    )
    return o, MDNState(*memory)


@cache
def _outputs_and_gradients(options):
    def run(inputs, cotangent):
        arrays = {name: inputs[name] for name in DIFFERENTIABLE if name in inputs}
        fixed = {name: x for name, x in inputs.items() if name not in arrays}
        outputs, pullback = jax.vjp(lambda x: kernel_rule(**x, **fixed, **dict(options)), arrays)
        return outputs, pullback(cotangent)[0]

    return jax.jit(run)


def kernel_outputs_and_gradients(inputs, cotangent=None, **options):
    """((o, state), gradients by name); one compilation for each shape and set of options."""
    run = _outputs_and_gradients(tuple(sorted(options.items())))
    return run(inputs, cotangents(inputs) if cotangent is None else cotangent)
