"""The conformance suite: what every implementation of the momentum delta rule must do.

    from mdn_jax.testing import conformance_checks

    @pytest.mark.parametrize("check", conformance_checks(my_rule), ids=str)
    def test_my_rule(check):
        check()

`my_rule` takes the arguments of `mdn_jax.momentum_delta_rule` by keyword and returns what that
returns. Without pytest: `for check in conformance_checks(my_rule): print(check, check.problems())`.

Notable:

* What is right comes from a loop over steps in numpy and float64 that shares nothing with any
  implementation (`mdn_jax.testing.definition`), gradients as well.
* Errors are those of each row of the batch, so that no row hides another. Rows have different
  gate regimes and keys: one compilation serves all of them.
* A subject is compiled ten times for its first dtype, twice for each other: what the checks do to
  the values (reset, scale, spoil, permute) they do to the arguments of the same functions.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax

from mdn_jax.testing import calls, isolation, numbers
from mdn_jax.testing.subject import Problems, Rule, Subject, WrongTypeError

Property = Callable[[Subject, str], Problems]

EVERY_DTYPE: tuple[Property, ...] = (
    numbers.every_regime,
    numbers.packed_and_grouped,
    numbers.gates_of_zero,
    numbers.short_keys,
    numbers.huge_keys,
    numbers.small_cotangents,
    isolation.no_leak,
    isolation.bad_values,
    isolation.bad_cotangents,
    isolation.causal,
    calls.other_orders,
    calls.idle_steps,
    calls.same_bits,
)
"""Properties of two compiled functions: one of a head a row, one that is packed and grouped."""
FIRST_DTYPE: tuple[Property, ...] = (
    numbers.any_length,
    calls.pieces,
    calls.documents_alone,
    numbers.keys_as_they_are,
    numbers.no_state_and_odd_dims,
    numbers.under_x64,
)
"""Properties that compile functions of their own."""
GRADIENTS_ONLY: tuple[Property, ...] = (numbers.small_cotangents, isolation.bad_cotangents)
"""Properties of gradients alone."""


@dataclass(frozen=True, eq=False)
class Check:
    """One property of one implementation in one dtype. Its name is its `str`.

    Attributes:
      function: yields what is wrong.
      subject: the implementation.
      dtype: of q, k and v.
    """

    function: Property
    subject: Subject
    dtype: str

    @property
    def name(self) -> str:
        """Of the property."""
        return self.function.__name__

    def __str__(self) -> str:
        return f"{self.dtype}-{self.name}"

    def problems(self) -> list[str]:
        """Everything that is wrong, a sentence each; empty where nothing is."""
        wide = jax.enable_x64(True) if self.dtype == "float64" else nullcontext()
        with wide:
            try:
                return list(self.function(self.subject, self.dtype))
            except WrongTypeError as error:
                return [str(error)]

    def __call__(self) -> None:
        """Raises AssertionError with everything that is wrong."""
        problems = self.problems()
        if problems:
            raise AssertionError(f"{self}: {self.function.__doc__}\n  " + "\n  ".join(problems))


def conformance_checks(rule: Rule, **options: Any) -> list[Check]:
    """Every check of an implementation, those that share compiled functions beside each other.

    Args:
      rule: takes the arguments of `momentum_delta_rule` by keyword, returns what that returns.
      options: of `Subject`: dtypes, chunk, lengths, sizes, whether it has gradients, limits.
    """
    subject = Subject(rule, **options)
    checks = []
    for dtype in subject.dtypes:
        properties = EVERY_DTYPE
        if dtype == subject.dtypes[0]:
            properties += FIRST_DTYPE
        if not subject.gradients:
            properties = tuple(x for x in properties if x not in GRADIENTS_ONLY)
        if dtype == "float64":  # which already is under x64
            properties = tuple(x for x in properties if x is not numbers.under_x64)
        checks += [Check(x, subject, dtype) for x in properties]
    return checks
