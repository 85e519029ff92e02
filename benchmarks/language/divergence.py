"""When and where a run left the path: from the metrics of its training."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, float | int | None]

_LAYER = re.compile(r"layers\.(\d+)\.memory_norm")


def explain(records: Sequence[Record]) -> dict[str, Any] | None:
    """What the metrics of a run say about its stability.

    Args:
      records: lines of its metrics, in their order; see `train.metrics.stability`.

    Returns:
      None where stability was not measured and no step was skipped. Else

        skipped_from  the first logged step with a step skipped up to it; None: none was
        unstable      the first measurement with gates outside the stable region: step, layer and
                      share of heads; None: none had
        growing       the first one with a state that grows or is not finite: step, layer, head,
                      quantity, growth (None: not finite); None: none had
        last          the last one before `skipped_from`, or of the run, in the layer whose state
                      is largest: step, layer, head, quantity, growth, norm
        curve         step, largest norm of a memory, largest growth of a state, over layers
    """
    skipped = next((int(r["step"] or 0) for r in records if (r.get("skipped") or 0) > 0), None)
    measured = [r for r in records if any(_LAYER.fullmatch(name) for name in r)]
    if not measured:
        return None if skipped is None else {"skipped_from": skipped}
    before = [r for r in measured if skipped is None or (r["step"] or 0) < skipped]
    return {
        "skipped_from": skipped,
        "unstable": next((x for r in measured if (x := _unstable(r)) is not None), None),
        "growing": next((x for r in measured if (x := _growing(r)) is not None), None),
        "last": _largest((before or measured)[-1]),
        "curve": [[r["step"], _most(r, "memory_norm"), _growth(r)] for r in measured],
    }


def describe(found: Mapping[str, Any] | None) -> str:
    """One line of `explain`'s result for a person; "" where there is nothing to say."""
    if not found:
        return ""
    parts = []
    if found["skipped_from"] is not None:
        parts.append(f"steps skipped from {found['skipped_from']:,} on")
    if unstable := found.get("unstable"):
        parts.append(
            f"gates outside the stable region at step {unstable['step']:,} in layer "
            f"{unstable['layer']}"
        )
    if growing := found.get("growing"):
        growth = growing["growth"]
        by = "not finite" if growth is None else f"grows {growth:.3g} times in half a row"
        parts.append(
            f"the {growing['quantity']} of layer {growing['layer']}, head {growing['head']} "
            f"{by} at step {growing['step']:,}"
        )
    elif (last := found.get("last")) and found["skipped_from"] is not None:
        norm = "not finite" if last["norm"] is None else f"{last['norm']:.3g}"
        parts.append(f"no state grew before; the largest memory, of layer {last['layer']}: {norm}")
    return "; ".join(parts)


def _layers(record: Record) -> list[int]:
    return sorted(int(x[1]) for name in record if (x := _LAYER.fullmatch(name)))


def _unstable(record: Record) -> dict[str, Any] | None:
    for layer in _layers(record):
        share = record.get(f"layers.{layer}.unstable_heads")
        if share is None or share > 0:
            return {"step": record["step"], "layer": layer, "share": share}
    return None


def _growing(record: Record) -> dict[str, Any] | None:
    for layer in _layers(record):
        share = record.get(f"layers.{layer}.growing_heads")
        if share is None or share > 0:
            return _fastest(record, layer)
    return None


def _fastest(record: Record, layer: int) -> dict[str, Any]:
    """The state of a layer that grew most."""
    growth = {name: record.get(f"layers.{layer}.{name}_growth") for name in ("memory", "momentum")}
    quantity = max(growth, key=lambda name: _number(growth[name]))
    return {
        "step": record["step"],
        "layer": layer,
        "head": record.get(f"layers.{layer}.fastest_head"),
        "quantity": quantity,
        "growth": growth[quantity],
    }


def _largest(record: Record) -> dict[str, Any]:
    norms = {layer: record[f"layers.{layer}.memory_norm"] for layer in _layers(record)}
    layer = max(norms, key=lambda layer: _number(norms[layer]))
    return _fastest(record, layer) | {"norm": norms[layer]}


def _most(record: Record, name: str) -> float | None:
    values = [record.get(f"layers.{layer}.{name}") for layer in _layers(record)]
    return max(values, key=_number)


def _growth(record: Record) -> float | None:
    values = [_most(record, "memory_growth"), _most(record, "momentum_growth")]
    return max(values, key=_number)


def _number(value: float | None) -> float:
    """What was not finite is null in the metrics, and larger than all else."""
    return float("inf") if value is None else value
