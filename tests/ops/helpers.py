"""What the operator's tests share."""

from functools import cache, partial

import jax

from mdn_jax import momentum_delta_rule, testing
from mdn_jax.testing import random_cotangents


@cache
def _compiled(options):
    rule = partial(momentum_delta_rule, **dict(options))
    return jax.jit(testing.outputs_and_gradients(rule))


def outputs_and_gradients(inputs, cotangent=None, **options):
    """((o, state), gradients by name) for random cotangents of every output."""
    run = _compiled(tuple(sorted(options.items())))
    return run(inputs, random_cotangents(inputs) if cotangent is None else cotangent)
