"""An implementation under test: runs it, and says how far it is from what is right."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mdn_jax.ops.state import MDNState
from mdn_jax.testing.cases import Case
from mdn_jax.testing.definition import definition
from mdn_jax.testing.errors import LIMITS, Limits, relative_error
from mdn_jax.testing.inputs import GATE_REGIMES, random_cotangents

Rule = Callable[..., tuple[Array, MDNState]]
"""Takes the arguments of `mdn_jax.momentum_delta_rule` by keyword and returns what that returns."""
Inputs = dict[str, Any]
Cotangents = tuple[Any, MDNState]
Problems = Iterator[str]
"""A sentence for everything that is wrong."""
Results = dict[str, np.ndarray]
"""`o`, `s`, `m`, and gradients as `d_q`, `d_initial_state.s`, ...: rows of the batch first."""

DIFFERENTIABLE = ("q", "k", "v", "log_alpha", "log_mu", "beta", "eta", "p", "initial_state")
GATES = ("log_alpha", "log_mu", "beta", "eta")
KEYS = ("random", "parallel", "zero")


def outputs_and_gradients(
    rule: Rule, *, gradients: bool = True
) -> Callable[[Inputs, Cotangents], tuple[tuple[Array, MDNState], Inputs]]:
    """A function of inputs and cotangents: the rule's outputs, and gradients by name.

    Args:
      rule: the operator.
      gradients: False: it is not differentiated, and there are none.
    """

    def both(inputs: Inputs, cotangents: Cotangents) -> tuple[tuple[Array, MDNState], Inputs]:
        if not gradients:
            return rule(**inputs), {}
        arrays = {name: inputs[name] for name in DIFFERENTIABLE if name in inputs}
        fixed = {name: x for name, x in inputs.items() if name not in arrays}
        outputs, pullback = jax.vjp(lambda x: rule(**x, **fixed), arrays)
        return outputs, pullback(cotangents)[0]

    return both


def named_results(outputs: tuple[Any, MDNState], gradients: Mapping[str, Any]) -> Results:
    """Every array of a call by its name, on the host."""
    o, state = outputs
    results = {"o": o, "s": state[0], "m": state[1]}
    for name, gradient in gradients.items():
        if name == "initial_state":
            results |= {"d_initial_state.s": gradient[0], "d_initial_state.m": gradient[1]}
        else:
            results[f"d_{name}"] = gradient
    return {name: np.asarray(x) for name, x in results.items()}


class WrongTypeError(TypeError):
    """An output has another dtype or shape than it should."""


@dataclass(frozen=True, eq=False)
class Subject:
    """An implementation under test, and what may be asked of it.

    Attributes:
      rule: the implementation; it is compiled with `jax.jit`.
      dtypes: of q, k and v that it takes. The first gets every check, the others those for which
        nothing more than two calls is compiled.
      chunk: steps in a chunk: lengths are around it, and a value that is not finite may spoil all
        of its own chunk.
      lengths: that are checked, ascending. Most checks use the longest.
      key_dim: K of most checks.
      value_dim: V of most checks.
      odd_dims: K and V that no tile fits.
      gradients: whether it is differentiable.
      limits: largest errors, by dtype.
    """

    rule: Rule
    dtypes: tuple[str, ...] = ("float32",)
    chunk: int = 64
    lengths: tuple[int, ...] = ()
    key_dim: int = 32
    value_dim: int = 32
    odd_dims: tuple[int, int] = (24, 40)
    gradients: bool = True
    limits: Mapping[str, Limits] = field(default_factory=lambda: LIMITS)
    _compiled: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.lengths:
            c = self.chunk
            around = sorted({1, c - 1, c, c + 1, 2 * c + 2} - {0})
            object.__setattr__(self, "lengths", tuple(around))

    @property
    def longest(self) -> int:
        """Steps of most checks."""
        return self.lengths[-1]

    def case(self, dtype: str, **change: Any) -> Case:
        """The call that most checks make: packed, grouped, with an erase key, a regime a row."""
        usual = Case(
            self.key_dim,
            self.value_dim,
            dtype,
            explicit_p=True,
            regime=tuple(GATE_REGIMES)[:4],
            length=self.longest,
            heads=2,
            groups=2,
            documents=3,
            rows=4,
        )
        return replace(usual, **change)

    def plain_case(self, dtype: str, length: int) -> Case:
        """A short call with the default erase key."""
        return self.case(
            dtype,
            explicit_p=False,
            regime=("layer", "wide", "ballistic", "momentum_one"),
            length=length,
            documents=min(3, length),
        )

    def run(self, inputs: Inputs, cotangents: Cotangents, **options: Any) -> Results:
        """The implementation's results; compiled once for every shape and set of options."""
        key = tuple(sorted(options.items()))
        if key not in self._compiled:
            rule = self.rule

            def with_options(**arrays: Any) -> tuple[Array, MDNState]:
                outputs = rule(**arrays, **options)
                for problem in wrong_types(
                    {"o": outputs[0], "s": outputs[1][0], "m": outputs[1][1]}, arrays
                ):
                    raise WrongTypeError(problem)  # it could not be differentiated
                return outputs

            both = outputs_and_gradients(with_options, gradients=self.gradients)
            self._compiled[key] = jax.jit(both)
        return named_results(*self._compiled[key](inputs, cotangents))

    def right(self, inputs: Inputs, cotangents: Cotangents, **options: Any) -> Results:
        """What `run` should give, in float64."""
        return named_results(*definition(inputs, cotangents if self.gradients else None, **options))

    def against_definition(
        self,
        case: Case,
        inputs: Inputs | None = None,
        cotangents: Cotangents | None = None,
        *,
        only: tuple[str, ...] = (),
        **options: Any,
    ) -> Problems:
        """What is wrong with a call.

        Args:
          case: the call; without `inputs`, these are its own.
          inputs: in place of the case's.
          cotangents: random ones if None.
          only: names of the results that count; empty: all.
          options: of the rule.
        """
        if inputs is None:
            inputs, expected = _case_and_results(case, self.gradients, tuple(options.items()))
            cotangents = random_cotangents(inputs)
        else:
            cotangents = random_cotangents(inputs) if cotangents is None else cotangents
            expected = self.right(inputs, cotangents, **options)
        actual = self.run(inputs, cotangents, **options)
        yield from wrong_types(actual, inputs)
        expected = {name: x for name, x in expected.items() if not only or name in only}
        limits = self.limits[case.dtype]
        yield from differences(actual, expected, {name: limits.of(name) for name in expected}, case)

    def alike(self, actual: Results, expected: Results, case: Case) -> Problems:
        """What differs between two ways to the same numbers."""
        limits = dict.fromkeys(expected, self.limits[case.dtype].same)
        yield from differences(actual, expected, limits, case)


@lru_cache(maxsize=16)
def _case_and_results(
    case: Case, gradients: bool, options: tuple[tuple[str, Any], ...]
) -> tuple[Inputs, Results]:
    """Inputs of a case and what is right, computed once for all implementations."""
    inputs = case.inputs()
    cotangents = random_cotangents(inputs) if gradients else None
    return inputs, named_results(*definition(inputs, cotangents, **dict(options)))


def differences(
    actual: Results, expected: Results, limits: Mapping[str, float], case: Case
) -> Problems:
    """A sentence for every result with a row beyond its limit: the worst row of it."""
    for name, right in expected.items():
        errors = [relative_error(x, y) for x, y in zip(actual[name], right, strict=True)]
        outside = sum(not error <= limits[name] for error in errors)
        if outside:
            worst = int(np.argmax(errors))
            yield (
                f"{name}: expected errors of at most {limits[name]:.0e}, got {errors[worst]:.1e} "
                f"in row {worst} ({described(case, worst)}); {outside} of {len(errors)} rows"
            )


def described(case: Case, row: int) -> str:
    """Gates and keys of a row."""
    regimes, kinds = (x if isinstance(x, tuple) else (x,) for x in (case.regime, case.keys))
    return f"{regimes[row % len(regimes)]} gates, {kinds[row % len(kinds)]} keys"


def wrong_types(actual: Mapping[str, Any], inputs: Inputs) -> Problems:
    """A sentence for every result of a dtype or shape that it should not have."""
    v, key_dim = inputs["v"], inputs["k"].shape[-1]
    wide = "float64" if v.dtype == "float64" else "float32"
    state = (v.shape[0], v.shape[2], key_dim, v.shape[3])
    expected = {"o": (v.dtype.name, v.shape), "s": (wide, state), "m": (wide, state)}
    for name, x in inputs.items():
        if name == "initial_state":
            expected |= {f"d_{name}.s": (wide, state), f"d_{name}.m": (wide, state)}
        else:
            expected[f"d_{name}"] = (x.dtype.name, x.shape)
    for name, x in actual.items():
        if (x.dtype.name, x.shape) != expected[name]:
            dtype, shape = expected[name]
            yield f"{name}: expected {dtype}{list(shape)}, got {x.dtype.name}{list(x.shape)}"


def other_bits(expected: Results, actual: Results) -> Problems:
    """A sentence for every array of `expected` with other bits in `actual`."""
    for name, x in expected.items():
        y = np.ascontiguousarray(actual[name])
        if np.ascontiguousarray(x).tobytes() != y.tobytes():
            count = int((x != y).sum())
            yield f"{name}: expected the same bits, got {count} of {x.size} numbers different"


def zeros_like_state(state: MDNState) -> MDNState:
    """A state of zeros."""
    return MDNState(*(jnp.asarray(np.zeros(x.shape, x.dtype)) for x in state))
