"""The integer arithmetic before a kernel's addresses, carried out as its Triton IR says."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
from jaxlib.mlir import ir
from jaxlib.triton import dialect

from pallas_kernels.offline_compile import Kernel

Value = Any
_BINARY = {
    "arith.addi": np.add,
    "arith.subi": np.subtract,
    "arith.muli": np.multiply,
    "arith.divsi": lambda a, b: np.sign(a) * np.sign(b) * (abs(a) // abs(b)),
    "arith.remsi": np.fmod,
    "arith.remui": np.fmod,
    "arith.divui": np.floor_divide,
    "arith.maxsi": np.maximum,
    "arith.minsi": np.minimum,
    "arith.andi": np.bitwise_and,
}
_COMPARISONS = (
    np.equal,
    np.not_equal,
    np.less,
    np.less_equal,
    np.greater,
    np.greater_equal,
)
"""In the order of MLIR's signed predicates."""


def offsets(kernel: Kernel) -> Iterator[np.ndarray]:
    """What the last program adds to each pointer, in the first and the last step of its loops.

    Raises:
      OverflowError: an integer on the way does not fit into its type.
    """
    _answer_for_python_classes()
    with ir.Context() as context:
        dialect.register_dialect(context)
        module = ir.Module.parse(kernel.source)
        for last in (False, True):
            evaluation = _Evaluation(kernel, last)
            for add in _find(module.operation, "tt.addptr"):
                yield evaluation.value(add.operands[1])


def _answer_for_python_classes() -> None:
    """MLIR looks for a module of the dialect at each operation, through files; there is none."""
    name = "jaxlib.mlir.dialects.tt"
    try:
        importlib.import_module(name)
    except ImportError:
        sys.modules[name] = ModuleType(name)


def _find(operation: Any, name: str) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for child in block:
                if child.operation.name == name:
                    yield child.operation
                yield from _find(child.operation, name)


class _Evaluation:
    """Values of a kernel's integers, exact in 64 bits, checked against their own types.

    What Triton repeats along an axis is here once: numpy does the rest where two meet.
    """

    def __init__(self, kernel: Kernel, last: bool) -> None:
        self._kernel, self._last = kernel, last
        self._known: dict[Value, np.ndarray] = {}

    def value(self, x: Value) -> np.ndarray:
        if x not in self._known:
            result = np.asarray(self._compute(x), np.int64)
            kind = x.type.element_type if isinstance(x.type, ir.RankedTensorType) else x.type
            bits = ir.IntegerType(kind).width
            low, high = (0, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            if result.min() < low or result.max() > high:
                name = self._kernel.name
                raise OverflowError(f"{name}: {result.max()} does not fit into {kind}: {x}")
            self._known[x] = result
        return self._known[x]

    def _compute(self, x: Value) -> Any:
        if isinstance(x, ir.BlockArgument):
            return self._step(x)
        op = x.owner if isinstance(x.owner, ir.Operation) else x.owner.operation
        if op.name == "arith.constant":
            return self._constant(op.attributes["value"])
        if op.name == "tt.get_program_id":
            return self._kernel.grid[ir.IntegerAttr(op.attributes["axis"]).value] - 1
        if op.name == "tt.make_range":
            start, end = (ir.IntegerAttr(op.attributes[name]).value for name in ("start", "end"))
            return np.arange(start, end)
        operands = [self.value(operand) for operand in op.operands]
        if op.name in ("arith.extui", "arith.extsi", "tt.splat", "tt.broadcast"):
            return operands[0]
        if op.name == "tt.expand_dims":
            if not operands[0].ndim:  # one number everywhere
                return operands[0]
            return np.expand_dims(operands[0], ir.IntegerAttr(op.attributes["axis"]).value)
        if op.name == "arith.select":
            return np.where(*operands)
        if op.name == "arith.cmpi":
            return _COMPARISONS[ir.IntegerAttr(op.attributes["predicate"]).value](*operands)
        return _BINARY[op.name](*operands)

    def _step(self, x: Any) -> np.ndarray:
        loop = x.owner.owner.operation
        if loop.name == "scf.while":
            return self._step_of_while(loop, x.arg_number)
        assert loop.name == "scf.for", loop.name
        assert x.arg_number == 0, "an address that a loop carries"
        low, end, step = (self.value(operand) for operand in loop.operands[:3])
        return low + (end - low - 1) // step * step if self._last else low

    def _step_of_while(self, loop: Any, number: int) -> np.ndarray:
        """Of a counter up to a limit, or of what the loop only carries along."""
        before, after = (list(region.blocks[0]) for region in loop.regions)
        *_, compare, condition = (op.operation for op in before)
        assert (compare.name, condition.name) == ("arith.cmpi", "scf.condition")
        counter, end = compare.operands
        carried = list(condition.operands)[1:]
        assert [y.arg_number for y in carried] == list(range(len(carried)))
        if number == counter.arg_number:
            return self.value(end) - 1 if self._last else self.value(loop.operands[number])
        kept = after[-1].operation.operands[number]
        assert isinstance(kept, ir.BlockArgument), "an address that a loop carries"
        assert kept.arg_number == number
        return self.value(loop.operands[number])

    def _constant(self, attribute: Any) -> Any:
        if isinstance(attribute, ir.DenseElementsAttr):
            values = np.array(attribute)
            return values.flat[0] if attribute.is_splat else values
        return int(ir.IntegerAttr(attribute).value)
