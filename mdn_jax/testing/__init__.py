"""Error metrics, random inputs and a conformance suite, for this project's tests and for yours.

For example::

    inputs = random_inputs(seed=0, length=200, regime="momentum_lost")
    (expected, state), _ = definition(inputs)
    assert relative_error(my_kernel(**inputs)[0], expected) < 1e-4

    for check in conformance_checks(my_kernel):
        check()
"""

from mdn_jax.testing.cases import Case
from mdn_jax.testing.conformance import Check, conformance_checks
from mdn_jax.testing.definition import definition
from mdn_jax.testing.errors import LIMITS, Limits, relative_error, relative_errors
from mdn_jax.testing.inputs import GATE_REGIMES, random_cotangents, random_inputs
from mdn_jax.testing.subject import (
    DIFFERENTIABLE,
    Cotangents,
    Inputs,
    Rule,
    Subject,
    outputs_and_gradients,
)

__all__ = [
    "DIFFERENTIABLE",
    "GATE_REGIMES",
    "LIMITS",
    "Case",
    "Check",
    "Cotangents",
    "Inputs",
    "Limits",
    "Rule",
    "Subject",
    "conformance_checks",
    "definition",
    "outputs_and_gradients",
    "random_cotangents",
    "random_inputs",
    "relative_error",
    "relative_errors",
]
