"""The scan in float32 as the reference of every benchmark, and how far from it a result is."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mdn_jax import MDNState, momentum_delta_rule
from mdn_jax.testing import (
    Inputs,
    Limits,
    Rule,
    outputs_and_gradients,
    random_inputs,
    relative_error,
)

Results = tuple[tuple[Array, MDNState], Inputs]


def inputs_of(shape: tuple[int, int, int, int, int], **options: Any) -> Inputs:
    """Random inputs of B, T, H, K, V; options as of `mdn_jax.testing.random_inputs`."""
    sizes: dict[str, Any] = dict(
        zip(("batch", "length", "heads", "key_dim", "value_dim"), shape, strict=True)
    )
    return random_inputs(seed=0, **sizes, **options)


def repeated_inputs_of(
    shape: tuple[int, int, int, int, int], *, drawn: int = 16_384, **options: Any
) -> Inputs:
    """The same for long rows: so many tokens are drawn, and come again and again."""
    batch, length, *rest = shape
    heads, key_dim, value_dim = rest
    x = inputs_of((batch, min(drawn, length), heads, key_dim, value_dim), **options)

    def repeated(y: Array) -> Array:
        again = -(-length // y.shape[1])
        return jnp.tile(y, (1, again, *(1,) * (y.ndim - 2)))[:, :length]

    return jax.tree.map(repeated, x)


def forward(rule: Rule) -> Callable[[Inputs], object]:
    """A function of inputs: the rule's outputs."""
    return lambda inputs: rule(**inputs)


def forward_keeping_states(rule: Rule) -> Callable[[Inputs], object]:
    """A function of inputs: outputs, and what the backward pass needs beside the inputs."""

    def run(inputs: Inputs) -> object:
        outputs, pullback = jax.vjp(lambda x: rule(**x), inputs)
        given = {id(x) for x in jax.tree.leaves(inputs)}
        return outputs, [x for x in jax.tree.leaves(pullback) if id(x) not in given]

    return run


def float32_reference(
    rule: Rule, *, gradients: bool = True
) -> Callable[[Inputs, tuple[Array, MDNState]], Results]:
    """The same in float32 at the highest precision, of the inputs as they are."""

    def both(inputs: Inputs, cotangent: tuple[Array, MDNState]) -> Results:
        with jax.default_matmul_precision("highest"):
            return outputs_and_gradients(rule, gradients=gradients)(widen(inputs), widen(cotangent))

    return both


_scan = partial(momentum_delta_rule, implementation="scan")
scan_outputs_and_gradients = float32_reference(_scan)
"""What counts as right, of inputs and cotangents."""
scan_outputs = float32_reference(_scan, gradients=False)
"""The same without gradients."""


def widen(tree: Any) -> Any:
    """Float arrays as float32."""

    def to_float32(x: Array) -> Array:
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(to_float32, tree)


def half_a_unit_off(tree: Any, seed: int = 7) -> Any:
    """Float arrays as float32, those of 16 bits moved at random by at most half a last place."""
    rng = np.random.default_rng(seed)

    def move(x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize != 2:
            return x
        # a unit in the last place is eps / 2 to eps of a number
        relative = float(jnp.finfo(x.dtype).eps) / 4 * rng.uniform(-1, 1, x.shape)
        return x.astype(jnp.float32) * (1 + jnp.asarray(relative, jnp.float32))

    return widen(jax.tree.map(move, tree))


class Worst(NamedTuple):
    """The largest errors of a call, with the names of what has them.

    Attributes:
      output: largest relative error of an output or final state.
      output_name: "o", "s" or "m".
      gradient: largest relative error of a gradient; 0 where there are none.
      gradient_name: of the argument; empty where there are none.
    """

    output: float
    output_name: str
    gradient: float
    gradient_name: str

    def within(self, limits: Limits) -> bool:
        """Whether both are within the limits."""
        return self.output <= limits.outputs and self.gradient <= limits.gradients

    def __str__(self) -> str:
        outputs = f"{self.output:.1e} ({self.output_name})"
        if not self.gradient_name:
            return outputs
        return f"{outputs}, gradients {self.gradient:.1e} ({self.gradient_name})"


def worst(actual: Results, expected: Results, *, on_host: bool = False) -> Worst:
    """The largest relative errors; inf where anything is nan.

    Args:
      actual: outputs and gradients.
      expected: the same, right.
      on_host: in float64, for small arrays: nothing is compiled. Otherwise on the device in
        float32, for large ones: nothing is copied.
    """
    if on_host:
        (o, state), gradients = jax.tree.map(relative_error, actual, expected)
    else:
        (o, state), gradients = jax.tree.map(float, _errors(actual, expected))
    outputs = {"o": o, "s": state.s, "m": state.m}
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="."): error
        for path, error in jax.tree_util.tree_leaves_with_path(gradients)
    }
    (output_name, output), (gradient_name, gradient) = (
        max(part.items(), key=lambda item: item[1]) for part in (outputs, flat or {"": 0.0})
    )
    return Worst(output, output_name, gradient, gradient_name)


@jax.jit
def _errors(actual: Results, expected: Results) -> Results:
    def error(x: Array, y: Array) -> Array:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        # scaled, as the squares of tiny gradients are zero in float32
        largest = jnp.max(jnp.abs(y))
        scale = jnp.where(largest > 0, largest, 1.0)
        distance, size = jnp.linalg.norm((x - y) / scale), jnp.linalg.norm(y / scale)
        relative = jnp.where(largest > 0, distance / size, jnp.where(distance > 0, jnp.inf, 0.0))
        return jnp.where(jnp.isfinite(distance), relative, jnp.inf)

    return jax.tree.map(error, actual, expected)
