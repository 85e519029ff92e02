"""What the devices of a compiled program send each other: read from XLA's text of it."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf" ({_KINDS})(-start)?[(]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) .*[{]$")
_CALLS = re.compile(
    r"\b(body|condition|calls|to_apply|\w+_computations?)=(?:(%[\w.-]+)|[{]([^}]*)[}])"
)
_TRIPS = re.compile(r'known_trip_count"?:[{]"?n"?:"?(\d+)')
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_WORK = re.compile(r" (fusion|custom-call|while|call|dot|convolution)[(]")


class Collective(NamedTuple):
    """One collective operation of a program.

    Attributes:
      kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "collective-permute".
      bytes: of its results on one device.
      scalar: whether none of them has a dimension.
      in_loop: whether a loop runs it.
      times: how often it runs in a call of the program, loops of unknown length counted once.
      beside: operations that are scheduled between its start and its end; None where it is waited
        for at once.
    """

    kind: str
    bytes: int
    scalar: bool
    in_loop: bool
    times: int
    beside: int | None


def collectives(text: str) -> list[Collective]:
    """Of a compiled program, from `compiled.as_text()`."""
    blocks, entry = _blocks(text)
    callers = defaultdict[str, list[tuple[str, int, bool]]](list)
    for name, lines in blocks.items():
        for line in lines:
            trips = _TRIPS.search(line)
            for how, one, several in _CALLS.findall(line):
                loop = how in ("body", "condition")
                times = int(trips[1]) if loop and trips else 1
                for each in re.findall(r"%([\w.-]+)", one or several):
                    callers[each].append((name, times, loop))

    @cache
    def runs(name: str) -> tuple[int, bool]:
        """How often a block runs, and whether in a loop."""
        if name == entry:
            return 1, False
        found = [(runs(caller), times, loop) for caller, times, loop in callers[name]]
        return (
            sum(before * times for (before, _), times, _ in found),
            any(inside or loop for (_, inside), _, loop in found),
        )

    return [
        _collective(match, lines, at, *runs(name))
        for name, lines in blocks.items()
        for at, match in _found(lines)
    ]


def summary(found: list[Collective]) -> dict[str, dict[str, float]]:
    """By kind: how many run in a call, and their bytes together."""
    result = dict[str, dict[str, float]]()
    for x in found:
        of_kind = result.setdefault(x.kind, {"times": 0, "bytes": 0, "waited for": 0})
        of_kind["times"] += x.times
        of_kind["bytes"] += x.times * x.bytes
        of_kind["waited for"] += x.times * (not x.beside)
    return result


def _blocks(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of every computation by its name, and the name of the first to run."""
    blocks, entry, lines = dict[str, list[str]](), "", list[str]()
    for line in text.splitlines():
        header = None if line.startswith(" ") else _HEADER.match(line)
        if header:
            lines = blocks[header[2]] = []
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)
    return blocks, entry


def _found(lines: list[str]) -> Iterator[tuple[int, re.Match[str]]]:
    for at, line in enumerate(lines):
        if match := _COLLECTIVE.search(line):
            yield at, match


def _collective(
    match: re.Match[str], lines: list[str], at: int, times: int, in_loop: bool
) -> Collective:
    shapes = [(dtype, dims) for dtype, dims in _SHAPE.findall(lines[at][: match.start()])]
    if match[2] and match[1] in ("all-gather", "collective-permute"):
        # the operands, the results, and marks of the exchange
        shapes = [x for x in shapes if x[1] or x[0] != "u32"]
        shapes = shapes[len(shapes) // 2 :]
    sizes = [
        _bits(dtype) * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in shapes
    ]
    beside = None
    if match[2] and '"is_sync":true' not in lines[at]:
        name = lines[at].split("=")[0].strip().removeprefix("ROOT ").strip()
        after = lines[at + 1 :]
        ends = [
            i for i, line in enumerate(after) if re.search(rf"-done[(].*{re.escape(name)}\b", line)
        ]
        beside = sum(bool(_WORK.search(line)) for line in after[: ends[0] if ends else None])
    return Collective(
        match[1], sum(sizes) // 8, not any(dims for _, dims in shapes), in_loop, times, beside
    )


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    if dtype == "token":
        return 0
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 0
