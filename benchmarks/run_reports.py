"""What the reports of runs share: reading records, the best learning rate, one style of figures."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.records import read_records

Record = Mapping[str, Any]


class Best(NamedTuple):
    """The runs of one model at its best learning rate.

    Attributes:
      learning_rate: by the mean choice accuracy of all seeds and settings.
      rates: learning rates that were tried.
      records: of the seeds.
    """

    learning_rate: float
    rates: int
    records: list[Record]

    def accuracies(self, part: str) -> dict[str, list[float]]:
        """For each setting of a part, one a seed."""
        return {name: [r[part][name] for r in self.records] for name in self.records[0][part]}


def read_experiment(paths: Sequence[Path], experiment: str) -> list[dict[str, Any]]:
    """The records of an experiment in all files.

    Raises:
      SystemExit: a file that is not there, or of something else, or records of several recipes.
    """
    records: list[dict[str, Any]] = []
    for path in paths:
        if not path.is_file():
            raise SystemExit(f"report: expected files of records, got {path}, which is not there")
        lines = read_records(path)
        records += [record for record in lines if record.get("experiment") == experiment]
    if not records:
        raise SystemExit(
            f"report: expected records of {experiment}, got none in {len(paths)} files"
        )
    recipes = [r["recipe"] for r in records]
    for other in recipes:
        if other != recipes[0]:
            name = next(n for n in other if other[n] != recipes[0].get(n))
            raise SystemExit(
                f"report: expected records of one recipe, got {name} = {recipes[0].get(name)!r} "
                f"and {other[name]!r}"
            )
    return records


def best(records: Sequence[Record]) -> Best:
    """Of one model; of a run that was made twice the last record counts."""
    runs = {(record["learning_rate"], record["seed"]): record for record in records}
    rates: dict[float, list[Record]] = {}
    for (rate, _), record in sorted(runs.items()):
        rates.setdefault(rate, []).append(record)
    most = max(map(len, rates.values()))
    complete = [rate for rate in rates if len(rates[rate]) == most]  # seeds that are not there yet

    def choice(rate: float) -> float:
        return statistics.fmean(x for r in rates[rate] for x in r["choice"].values())

    chosen = max(complete, key=choice)
    return Best(chosen, len(rates), rates[chosen])


def spread(values: Sequence[float]) -> str:
    """In percent, mean ± standard deviation; one value has none."""
    if len(values) < 2:
        return f"{100 * values[0]:.1f}"
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def provenance(records: Sequence[Record]) -> str:
    """How many runs, how long, on what, of which commit."""
    about = sorted({(r["device"], r["commit"]) for r in records})
    # a group's minutes, shared by those that ran side by side
    minutes = sum(r["minutes"] / r["side_by_side"] for r in records)
    return (
        f"{len(records)} runs, {math.ceil(minutes):,} device minutes; "
        + "; ".join(f"{device}, commit {_short(commit)}" for device, commit in about)
        + "."
    )


def _short(commit: str) -> str:
    name, *changed = commit.split("-")
    return "-".join([name[:12], *changed])
