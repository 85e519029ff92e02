"""Rows of the table of `python -m benchmarks kernels`, and of its JSON."""

from dataclasses import asdict
from typing import Any, Literal, NamedTuple

import jax
from tabulate import tabulate

from benchmarks.costs import Cost
from benchmarks.reference import Worst
from benchmarks.timing import Timing, milliseconds

Shape = tuple[int, int, int, int, int]
Part = Literal["forward", "kept", "both"]

PARTS = {"forward": "forward", "kept": "forward, states kept", "both": "forward + backward"}
COLUMNS = ["", "pass", "ms", "x first", "TFLOP/s", "GB/s", "x floor", "MiB planned", "MiB peak"]
COLUMNS += ["compile s", "error", "of gradients"]


class Row(NamedTuple):
    """One timed pass of one operator.

    Attributes:
      name: of the operator.
      part: which pass.
      cost: of the operator, whatever the implementation does.
      timing: measured.
      errors: against the reference.
    """

    name: str
    part: Part
    cost: Cost
    timing: Timing
    errors: Worst


def precision_note() -> str:
    """For headers: the precision that jax was asked for, if any."""
    precision = jax.config.jax_default_matmul_precision
    return f", default_matmul_precision {precision}" if precision else ""


def shape_text(shape: Shape) -> str:
    """B,T,H,K,V."""
    return ",".join(map(str, shape))


def table(rows: list[Row], device: str, dtype: str) -> str:
    """One row a pass of each operator."""
    first: dict[str, float] = {}
    lines = []
    for name, part, cost, timing, errors in rows:
        floor = cost.floor(device, dtype)
        lines.append(
            [
                name,
                PARTS[part],
                milliseconds(timing),
                f"{first.setdefault(part, timing.median) / timing.median:.2f}",
                f"{cost.flops / timing.median / 1e12:.3g}",
                f"{cost.bytes / timing.median / 1e9:.4g}",
                f"{timing.median / floor:.2f}" if floor else "-",
                f"{timing.memory / 2**20:.0f}",
                "-" if timing.peak is None else f"{timing.peak / 2**20:.0f}",
                f"{timing.compile:.1f}",
                f"{errors.output:.1e}",
                f"{errors.gradient:.1e}",
            ]
        )
    return tabulate(lines, headers=COLUMNS, tablefmt="github", disable_numparse=True)


def record(row: Row, shape: Shape, device: str, dtype: str) -> dict[str, Any]:
    """For JSON: seconds, bytes, operations."""
    return {
        "shape": shape,
        "name": row.name,
        "pass": PARTS[row.part],
        "flops": row.cost.flops,
        "bytes": row.cost.bytes,
        "floor": row.cost.floor(device, dtype),
        "errors": row.errors._asdict(),
        **asdict(row.timing),
    }
