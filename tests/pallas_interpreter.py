"""Smaller programs of Pallas' interpreter, with the same results.

Compiling them is much of the time of the tests of kernels. Two thirds of their operations are
of no use, and XLA removes some of them late and others not at all:

* Every start of a slice is asked whether it counts from the end. No kernel's does: on GPUs a
  negative offset is an address before the array.
* Every block of an input is written back after each program of the grid, so that loops carry
  and copy all inputs.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

from jax._src import core, state
from jax._src.lax import slicing
from jax._src.pallas import hlo_interpreter
from jax._src.state import discharge

_UNWRITTEN = object()
_to_hlo = hlo_interpreter.kernel_to_hlo_jaxpr
_write_back = hlo_interpreter._dynamic_update_slice

ORIGINALS = (
    (hlo_interpreter, "slicing", slicing),
    (discharge, "lax_slicing", slicing),
    (hlo_interpreter, "kernel_to_hlo_jaxpr", _to_hlo),
    (hlo_interpreter, "_dynamic_update_slice", _write_back),
)
"""What is replaced: module, name and JAX's own."""


def make_smaller() -> None:
    """Has the interpreter of this process make the smaller programs."""
    from_zero = {
        name: partial(getattr(slicing, name), allow_negative_indices=False)
        for name in ("dynamic_slice", "dynamic_update_slice")
    }
    slices = SimpleNamespace(**vars(slicing) | from_zero)
    ours = (slices, slices, _without_what_is_only_read, _written_back)
    for (module, name, _), replacement in zip(ORIGINALS, ours, strict=True):
        setattr(module, name, replacement)


def _without_what_is_only_read(jaxpr: core.Jaxpr, *args: Any) -> tuple[Any, ...]:
    """The kernel as a function of its blocks, which returns those that it writes."""
    discharged, *others = _to_hlo(jaxpr, *args)
    effects = (state.WriteEffect, state.AccumEffect)
    written = {effect.input for effect in jaxpr.effects if isinstance(effect, effects)}
    blocks = [
        out if ref in written else core.Literal(_UNWRITTEN, out.aval)
        for ref, out in zip(jaxpr.invars, discharged.outvars, strict=True)
    ]
    return discharged.replace(outvars=blocks), *others


def _written_back(start: Any, shape: Any, array: Any, block: Any, squeezed: Any) -> Any:
    if block is _UNWRITTEN:
        return array
    return _write_back(start, shape, array, block, squeezed)
