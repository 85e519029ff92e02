"""The tables of speed in the documents, written from the benchmarks' JSON in `benchmarks/results`.

    python -m benchmarks kernels ... --output benchmarks/results/kernels-h200.json
    python -m benchmarks stages ... --output benchmarks/results/stages-h200-k128-v256.json
    python -m benchmarks.speed_table --commit HASH

A document holds a table between two comments, `<!-- table: NAME -->` and `<!-- end: NAME -->`.
`kernels` (docs/kernels.md) is the operator, a row a shape; `stages` (docs/design.md) is each kernel
by itself. `tests/benchmarks/test_speed_table.py` holds both to the JSON.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tabulate import tabulate

from benchmarks.report import PARTS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = {"kernels": ROOT / "docs" / "kernels.md", "stages": ROOT / "docs" / "design.md"}
"""Where the table of each command lies."""
FORWARD_STAGES = 3
"""How many of the kernels are the forward pass; they come first."""

Report = dict[str, Any]
"""What a command writes with `--output`, and the commit that it measured."""


@dataclass(frozen=True)
class SpeedTableConfig:
    """Writes the tables of speed into the documents."""

    commit: str | None = None
    """What the reports without a commit were measured at; it is written into them."""


def main() -> None:
    """Entry point of the module."""
    config = tyro.cli(SpeedTableConfig)
    for command, document in DOCUMENTS.items():
        text = document.read_text()
        document.write_text(with_table(text, command, table(command, read(command, config.commit))))


def read(command: str, commit: str | None = None) -> list[Report]:
    """The reports of a command, in the order of their files' names.

    Args:
      command: "kernels" or "stages".
      commit: of reports that name none; it is written into their files.

    Raises:
      SystemExit: a report without a commit.
    """
    reports = []
    for path in sorted(RESULTS.glob(f"{command}-*.json")):
        report = json.loads(path.read_text())
        if not report.get("commit"):
            if not commit:
                raise SystemExit(f"commit: expected that of {path.name}, got none; give --commit")
            report["commit"] = commit
            path.write_text(json.dumps(report, indent=1) + "\n")
        reports.append(report)
    return reports


def table(command: str, reports: Sequence[Report]) -> str:
    """The table of a command's reports, in Markdown."""
    return _of_shapes(reports) if command == "kernels" else _of_kernels(reports)


def with_table(text: str, name: str, table: str) -> str:
    """A document with another table between the comments of that name.

    Raises:
      SystemExit: a document without the two comments.
    """
    begin, end = f"<!-- table: {name} -->\n", f"<!-- end: {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"document: expected {begin.strip()} and {end} once each")
    before, rest = text.split(begin)
    return f"{before}{begin}{table}\n{end}{rest.split(end)[1]}"


def _of_shapes(reports: Sequence[Report]) -> str:
    rows = []
    for report in reports:
        passes: dict[tuple[int, ...], dict[str, dict[str, Any]]] = {}
        for result in report["results"]:
            if result["name"] == "pallas_triton":
                passes.setdefault(tuple(result["shape"]), {})[result["pass"]] = result
        for shape, timed in passes.items():
            both = [timed[PARTS[part]] for part in ("kept", "both")]
            rows.append(
                [
                    ",".join(map(str, shape)),
                    *(f"{x['median'] * 1e3:.3f} ± {x['spread'] * 5e2:.3f}" for x in both),
                    " / ".join(_times(x) for x in both),
                    report["device"],
                    report["commit"],
                ]
            )
    headers = ["B,T,H,K,V", "forward ms", "forward + backward ms", "x floor", "GPU", "commit"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _of_kernels(reports: Sequence[Report]) -> str:
    rows = []
    for report in reports:
        stages = report["results"]
        names = list(stages)
        sums = {"forward": names[:FORWARD_STAGES], "forward + backward": names}
        for name, parts in ({f"`{name}`": [name] for name in names} | sums).items():
            total = {
                field: sum(stages[part][field] or 0 for part in parts)
                for field in ("flops", "bytes", "floor", "median")
            }
            rows.append(
                [
                    ",".join(map(str, report["config"]["shape"])),
                    name,
                    f"{total['flops'] / 1e9:.3g}",
                    f"{total['bytes'] / 1e6:,.0f}",
                    f"{total['floor'] * 1e3:.3f}" if total["floor"] else "-",
                    f"{total['median'] * 1e3:.3f}",
                    _times(total),
                    report["device"],
                    report["commit"],
                ]
            )
    headers = ["B,T,H,K,V", "kernel", "GFLOP", "MB", "floor ms", "ms", "x floor", "GPU", "commit"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _times(result: dict[str, Any]) -> str:
    """How many times its floor it takes."""
    return f"{result['median'] / result['floor']:.2f}" if result["floor"] else "-"


if __name__ == "__main__":
    main()
