"""Tables and figures of `python -m benchmarks language`, from its records alone."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from benchmarks.language import figures
from benchmarks.language.divergence import describe
from benchmarks.records import read_records
from benchmarks.style import STYLES

Record = Mapping[str, Any]


class Results(NamedTuple):
    """The runs of one model.

    Attributes:
      name: of the model.
      shown: in tables.
      rate: the best learning rate, on documents held out for the choice.
      rates: learning rates that were tried.
      runs: at the best one, a record a seed.
    """

    name: str
    shown: str
    rate: float
    rates: int
    runs: list[Record]

    @property
    def label(self) -> str:
        """Name, parameters and state, for a legend."""
        first = self.runs[0]
        state = "grows" if first["state"] is None else f"{first['state'] / 1e6:.2f}M"
        return f"{self.shown} ({first['parameters'] / 1e6:.1f}M, state {state})"

    def tests(self) -> dict[int, float]:
        """Test bits per byte of each seed, the mean of the domains."""
        return {
            run["seed"]: statistics.fmean(run["domains"].values())
            for run in self.runs
            if run["domains"] and None not in run["domains"].values()
        }


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The records of all files.

    Raises:
      SystemExit: a file that is not there, or of something else, or records of several recipes.
    """
    records: list[dict[str, Any]] = []
    for path in paths:
        if not path.is_file():
            raise SystemExit(f"report: expected files of records, got {path}, which is not there")
        records += [r for r in read_records(path) if r.get("experiment") == "language"]
    if not records:
        raise SystemExit(f"report: expected records of language, got none in {len(paths)} files")
    first = records[0]["recipe"]
    for other in (record["recipe"] for record in records):
        if other != first:
            name = next(n for n in other if other[n] != first.get(n))
            raise SystemExit(
                f"report: expected records of one recipe, got {name} = {first.get(name)!r} and "
                f"{other[name]!r}"
            )
    return records


def results(records: Sequence[Record]) -> list[Results]:
    """The models; of a run that was made twice the last record counts."""
    models: dict[str, dict[tuple[float, int], Record]] = {}
    for record in records:
        runs = models.setdefault(record["model"], {})
        runs[record["learning_rate"], record["seed"]] = record
    order = list(STYLES)
    return [_best(models[name]) for name in sorted(models, key=order.index)]


def _best(runs: Mapping[tuple[float, int], Record]) -> Results:
    rates: dict[float, list[Record]] = {}
    for (rate, _), record in sorted(runs.items()):
        rates.setdefault(rate, []).append(record)
    most = max(map(len, rates.values()))

    def choice(rate: float) -> float:
        bits = [run["bits"] for run in rates[rate]]
        return math.inf if None in bits else statistics.fmean(bits)

    best = min((rate for rate in rates if len(rates[rate]) == most), key=choice)
    own = rates[best]
    return Results(own[0]["model"], own[0]["shown"], best, len(rates), own)


def ending(bits: float | None, diverged: int | None) -> str:
    """How a run ended, in words."""
    if diverged is not None:
        return f"diverged at step {diverged:,}"
    return "not finite" if bits is None else f"{bits:.4f} bits per byte"


def difference(model: Results, other: Results) -> str:
    """Test bits of a model less those of another, seed by seed: mean ± standard error."""
    own, others = model.tests(), other.tests()
    pairs = [own[seed] - others[seed] for seed in own if seed in others]
    if not pairs:
        return ""
    if len(pairs) == 1:
        return f"{pairs[0]:+.4f}"
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return f"{statistics.fmean(pairs):+.4f} ± {error:.4f}"


def _spread(values: Sequence[float], digits: int = 4) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def tables(models: Sequence[Results]) -> str:
    """All tables: the models, then domains, positions, needles, and what left the path."""
    mdn = next((model for model in models if model.name == "mdn"), models[0])
    lines = []
    for model in models:
        first = model.runs[0]
        ends = [ending(None, run["diverged"]) for run in model.runs if run["bits"] is None]
        bits = [run["bits"] for run in model.runs if run["bits"] is not None]
        lines.append(
            [
                model.shown,
                f"{first['parameters']:,} ({first['without_embeddings']:,})",
                "grows" if first["state"] is None else f"{first['state']:,}",
                f"{model.rate:g} of {model.rates}",
                len(model.runs),
                "; ".join([_spread(bits), *ends] if bits else ends),
                _spread(list(model.tests().values())),
                "" if model is mdn else difference(model, mdn),
                sum(run["skipped"] for run in model.runs),
            ]
        )
    headers = ["", "parameters (without embeddings)", "state", "rate", "seeds"]
    headers += ["held-out bits per byte", "test, mean of domains", f"less {mdn.shown}", "skipped"]
    parts = [_markdown(lines, headers)]
    parts += _by(models, "domains", "test bits per byte")
    parts += _by(models, "positions", "nats per token, from the first to before the last place")
    parts += _by(models, "needle", "rows with all digits right, %")
    said = [
        f"- {model.shown}, seed {run['seed']}: {text}"
        for model in models
        for run in model.runs
        if (text := describe(run["stability"]))
    ]
    if said:
        parts.append("\n".join(["Stability:", *said]))
    return "\n\n".join(parts)


def _by(models: Sequence[Results], part: str, title: str) -> list[str]:
    """A table of one part of the test, a column a domain, place or length."""
    cells = [[figures.points(run, part) for run in model.runs] for model in models]
    names = list(dict.fromkeys(name for runs in cells for run in runs for name in run))
    if not names:
        return []
    scale, digits = (100, 1) if part == "needle" else (1, 4)
    lines = [
        [model.shown]
        + [_spread([scale * run[name] for run in runs if name in run], digits) for name in names]
        for model, runs in zip(models, cells, strict=True)
    ]
    return [f"{title[0].upper()}{title[1:]}:\n\n" + _markdown(lines, ["", *map(str, names)])]


def _markdown(lines: list[list[Any]], headers: list[str]) -> str:
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def write(records: Sequence[Record], directory: Path) -> str:
    """Writes `table.md`, `curves.png`, `test.png`, `stability.png`; returns the tables."""
    models = results(records)
    about = sorted({(r["device"], r["commit"]) for r in records})
    minutes = math.ceil(sum(r["minutes"] for r in records))
    where = "; ".join(f"{device}, commit {commit[:12]}" for device, commit in about)
    text = f"{tables(models)}\n\n{len(records)} runs, {minutes:,} device minutes; {where}.\n"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "table.md").write_text(text)
    figures.draw_curves(models, directory / "curves.png")
    figures.draw_tests(models, directory / "test.png")
    figures.draw_stability(models, directory / "stability.png")
    return text
